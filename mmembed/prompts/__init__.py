"""Prompts: how content, role and instruction become the text around the content.

A style is one small class that returns a `Rendered`: pieces, not a string, so that the preprocessor knows exactly which
characters are instruction (kept out of pooling) and which are suffix (kept by truncation). The same style trains and
serves; it is saved with the model. One file per style; `PROMPTS.build({"type": "instruct", "mask_instruction": true})`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmembed.content import Content, Role
from mmembed.registry import Registry


@dataclass(frozen=True, slots=True)
class Rendered:
    """One input, in pieces.

    Attributes:
        prefix: instruction text before the content; out of the pool mask where the style says `mask_instruction`.
        suffix: text after the content; truncation never removes it. Pooled by the last token's pooling only (it ends
            there), or where the style does not say `mask_instruction`.
        system: the system turn (chat only).
        chat: write it through the backbone's chat template, as the user's turn.
        add_generation_prompt: end with the assistant's header (chat only).
        template: variables of the chat template; one that knows them not leaves them.
    """

    content: Content
    prefix: str = ""
    suffix: str = ""
    system: str | None = None
    chat: bool = False
    add_generation_prompt: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)


class PromptStyle:
    """Base of the styles.

    Args:
        mask_instruction: keep the prompt's own tokens out of pooling (NV-Embed, section 3): the instruction, and what
            follows the content unless the last token is pooled.
        append_eos: end the input with the tokenizer's end token. None: yes where the last token is pooled.
    """

    name: ClassVar[str]
    reads_pairs: ClassVar[bool] = False  # of a query and a document, as a reranker does
    reads_lists: ClassVar[bool] = False  # of a query and many documents, as an in-context reranker does
    chat: bool = False  # of lists: whether they are the user's turn of a chat
    system: str | None = None
    signals: ClassVar[int] = 2  # of lists: tokens at the end of the prompt whose attention scores documents
    opening: ClassVar[str] = ""  # of lists: how the answer begins
    words: tuple[str, ...] = ()  # the answers that it asks for, of a relevant document first

    def __init__(self, mask_instruction: bool = True, append_eos: bool | None = None) -> None:
        self.mask_instruction, self.append_eos = mask_instruction, append_eos

    def render(self, content: Content, role: Role, instruction: str | None) -> Rendered:
        """The pieces of one input. `role` is `query` or `document`."""
        raise NotImplementedError

    def render_pair(self, query: Content, document: Content, instruction: str | None) -> Rendered:
        """The pieces of a query with a document, for styles that read pairs."""
        raise NotImplementedError

    def render_list(self, query: Content, instruction: str | None) -> tuple[Rendered, Rendered]:
        """The blocks in front of the documents and behind them, for styles that read lists."""
        raise NotImplementedError

    def render_listed(self, document: Content, number: int) -> Rendered:
        """The block of one document, for styles that read lists."""
        raise NotImplementedError

    def answer(self, numbers: Sequence[int]) -> str:
        """What stands behind `opening`, for styles that read lists: the documents of these numbers, best first."""
        raise NotImplementedError


PROMPTS: Registry[PromptStyle] = Registry("mmembed.prompts", PromptStyle)
