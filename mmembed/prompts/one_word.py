"""Asks the backbone's chat model for one word; the last token's state, right before the answer, is the embedding.

user = instruction "\\n" content "\\nSummarize the above text in one word:"

PromptEOL (arXiv 2307.16645) and E5-V (2407.12580) showed that a generative model compresses its input best when it is
about to say it in one word. Use it with last_token pooling; works without any training.

When: a chat model embeds without training.
"""

from mmembed.content import Content, Image, Role, Text, Video
from mmembed.prompts import PromptStyle, Rendered


class OneWord(PromptStyle):
    """The content as the user's turn, a closing request for one word, then the assistant's header.

    Args:
        text_request, image_request, mixed_request: the closing line by what the content holds.
    """

    name = "one_word"

    def __init__(
        self,
        text_request: str = "\nSummarize the above text in one word:",
        image_request: str = "\nSummarize the above image in one word:",
        mixed_request: str = "\nSummarize the above image and text in one word:",
        mask_instruction: bool = True,
    ) -> None:
        super().__init__(mask_instruction, append_eos=False)
        self.requests = {"text": text_request, "image": image_request, "mixed": mixed_request}

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        return asked(content, instruction, self.requests[kind_of(content)])


def asked(content: Content, instruction: str | None, request: str, system: str | None = None) -> Rendered:
    """A user's turn of instruction, content and request, then the header of the answer."""
    prefix = f"{instruction}\n" if instruction else ""
    return Rendered(content, prefix, request, system, chat=True, add_generation_prompt=True)


def kind_of(content: Content) -> str:
    """`text`, `image` (videos too) or `mixed`."""
    pictures = any(isinstance(part, Image | Video) for part in content)
    texts = any(isinstance(part, Text) and part.text for part in content)
    return "mixed" if pictures and texts else "image" if pictures else "text"
