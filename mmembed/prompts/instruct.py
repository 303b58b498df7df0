"""`Instruct: ... Query: ...` before a query, documents bare (E5-mistral, arXiv 2401.00368; NV-Embed, section 4).

query    = "Instruct: " instruction "\\nQuery: " content
document = content

When: several tasks are told apart by an instruction on the query's side.
"""

from mmembed.content import Content, Role
from mmembed.errors import ConfigError
from mmembed.prompts import PromptStyle, Rendered


class Instruct(PromptStyle):
    """Writes the instruction of a query; a document has one only where the task is symmetric (STS).

    Args:
        template: must hold `{instruction}`; the content follows it.
        default_instruction: used for a query that brings none; empty leaves the query bare.
    """

    name = "instruct"

    def __init__(
        self,
        template: str = "Instruct: {instruction}\nQuery: ",
        default_instruction: str = "",
        mask_instruction: bool = True,
        append_eos: bool | None = None,
    ) -> None:
        super().__init__(mask_instruction, append_eos)
        if "{instruction}" not in template:
            raise ConfigError(
                f"prompt.instruct.template: {template!r} does not hold {{instruction}}, so no instruction would be "
                "written; add it, or use plain with query_prefix"
            )
        self.template, self.default_instruction = template, default_instruction

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        if instruction is None and role == "query":
            instruction = self.default_instruction
        return Rendered(content, prefix=self.template.replace("{instruction}", instruction) if instruction else "")
