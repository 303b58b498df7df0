"""A query, a list of documents, and the question which of them answer it: the input of an in-context reranker.

block 0     = instruction, Query: query
block i     = ID: i | CONTENT: document | END ID: i
last block  = Query: query, the question, Final Answer: [
completion  = 3, 1]

BlockRank (arXiv 2510.05396; released code): the query stands in front of the documents, whose tokens then
know what they are read for (P@1 29.1 against 24.2 without), and again behind them. Block 0 is computed once.

When: rerankers that read a list in one pass (head `attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mmembed.content import Content, Role, Text
from mmembed.errors import ConfigError
from mmembed.prompts import PromptStyle, Rendered

INSTRUCTION = "Find the documents that answer the query. Each has an ID."
QUESTION = "Which documents answer the query? Give their IDs, the best first."


class InContext(PromptStyle):
    """The blocks of a list.

    Args:
        instruction: of queries that bring none.
        question: behind the documents.
        system: a system turn, of chats.
        chat: write it through the backbone's chat template; false for a base model.
    """

    name = "in_context"
    reads_pairs = True
    reads_lists = True
    opening: ClassVar[str] = "Final Answer: ["

    def __init__(
        self, instruction: str = INSTRUCTION, question: str = QUESTION, system: str | None = None, chat: bool = True
    ) -> None:
        super().__init__(mask_instruction=False, append_eos=False)
        if system is not None and not chat:
            raise ConfigError("prompt 'in_context': a system turn is a chat's; remove system, or chat: false")
        self.instruction, self.question, self.system, self.chat = instruction, question, system, chat

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        raise ConfigError("prompt 'in_context' writes lists of documents; an embedder has one content: choose another")

    def render_pair(self, query: Content, document: Content, instruction: str | None) -> Rendered:
        """A list of one document, in one piece."""
        (opened, closed), one = self.render_list(query, instruction), self.render_listed(document, 1)
        between = Text(opened.suffix + one.prefix), *document, Text(one.suffix + closed.prefix)
        content = (Text(opened.prefix), *query, *between, *query, Text(closed.suffix))
        return Rendered(content, system=self.system, chat=self.chat, add_generation_prompt=self.chat)

    def render_list(self, query: Content, instruction: str | None) -> tuple[Rendered, Rendered]:
        told = instruction or self.instruction
        return (
            Rendered(query, prefix=f"{told}\nQuery: ", suffix="\n\n"),
            Rendered(query, prefix="\nQuery: ", suffix=f"\n{self.question}\n"),
        )

    def render_listed(self, document: Content, number: int) -> Rendered:
        return Rendered(document, prefix=f"ID: {number} | CONTENT: ", suffix=f" | END ID: {number}\n")

    def answer(self, numbers: Sequence[int]) -> str:
        return ", ".join(map(str, numbers)) + "]"
