"""Two-level prompt (SaHa, arXiv 2508.00955): the system turn fixes the task, the user's turn has the instruction.

system          = `system`
user (query)    = instruction "\\n" content request,  request: that of text, of image or of mixed content
user (document) = instruction "\\n" content `document_request`

The system turn is the same for queries and documents: summarise an image, describe a text, in one word. The user's turn
holds the instruction and the content; a query ends with a request to represent it in one word. The embedding is the
last token's state, after the assistant's header: use last_token pooling. The strings are part of a checkpoint: to
serve a model trained elsewhere, set them to its own.

When: a chat model embeds several data sets without training, or as the start of SaHa.
"""

from mmembed.content import Content, Role
from mmembed.prompts import PromptStyle, Rendered
from mmembed.prompts.one_word import asked, kind_of


class Hierarchical(PromptStyle):
    """System turn for the task, user's turn for the data set.

    Args:
        system: the first level, for queries and documents alike.
        text_request, image_request, mixed_request: the line that closes a query, by what it holds.
        document_request: the line that closes a document; none in the paper.
    """

    name = "hierarchical"

    def __init__(
        self,
        system: str = "If an image is given, summarize it in one word. If only text is given, describe it in one word.",
        text_request: str = "\nRepresent the given text in one word.",
        image_request: str = "\nRepresent the given image in one word.",
        mixed_request: str = "\nRepresent the given text and image in one word.",
        document_request: str = "",
        mask_instruction: bool = True,
    ) -> None:
        super().__init__(mask_instruction, append_eos=False)
        self.system, self.document_request = system, document_request
        self.requests = {"text": text_request, "image": image_request, "mixed": mixed_request}

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        request = self.requests[kind_of(content)] if role == "query" else self.document_request
        return asked(content, instruction, request, self.system)
