"""The content alone, after its instruction if it has one.

input = instruction " " content, or prefix content where there is no instruction

Fixed prefixes for the two sides are E5's (arXiv 2212.03533).

When: the backbone is no chat model, or prefixes are fixed (`query: `, `passage: `). The default.
"""

from mmembed.content import Content, Role
from mmembed.prompts import PromptStyle, Rendered


class Plain(PromptStyle):
    """Instruction (or a fixed prefix) and content, nothing else.

    Args:
        query_prefix: written before every query that brings no instruction, for example `query: ` (E5).
        document_prefix: the same for documents.
    """

    name = "plain"

    def __init__(
        self,
        query_prefix: str = "",
        document_prefix: str = "",
        mask_instruction: bool = True,
        append_eos: bool | None = None,
    ) -> None:
        super().__init__(mask_instruction, append_eos)
        self.prefixes = {"query": query_prefix, "document": document_prefix}

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        return Rendered(content, prefix=f"{instruction} " if instruction else self.prefixes[role])
