"""The content as the user's turn of the backbone's own chat template, the instruction as the system's turn.

system    = instruction, or `system` where there is none
user      = content
assistant = (nothing yet: its header ends the input)

When: the backbone is a chat model and is fine-tuned as an embedder.
"""

from mmembed.content import Content, Role
from mmembed.prompts import PromptStyle, Rendered


class Chat(PromptStyle):
    """What Qwen3-VL-Embedding and most chat-tuned embedders do.

    Args:
        system: the system turn of inputs without an instruction; empty leaves it to the template.
        add_generation_prompt: end with the assistant's header, whose last token is then the pooled one.
    """

    name = "chat"

    def __init__(self, system: str = "", add_generation_prompt: bool = True, mask_instruction: bool = True) -> None:
        super().__init__(mask_instruction, append_eos=False)
        self.system, self.add_generation_prompt = system, add_generation_prompt

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        system = instruction or self.system or None
        return Rendered(content, system=system, chat=True, add_generation_prompt=self.add_generation_prompt)
