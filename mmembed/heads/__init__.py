"""Heads of rerankers: the last hidden state of a pair of query and document -> logits, and these -> one score.

A reranker is the embedding model of pairs whose vector is its head's logits, so it trains, is saved and resumed as an
embedder is. One file per head; `HEADS.build("yes_no", hidden_size=H)`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mmembed.registry import Registry


class Head(nn.Linear):
    """Base of the heads: (B, H) -> (B, L) logits, without bias.

    logits: L.
    words: of which the weights are the backbone's own output embeddings; none: the weights are fresh.
    """

    name: ClassVar[str]
    logits: ClassVar[int]

    def __init__(self, hidden_size: int, trained: bool) -> None:
        super().__init__(hidden_size, self.logits, bias=False)
        self.requires_grad_(trained)

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    @staticmethod
    def difference(logits: Tensor) -> Tensor:
        """(..., L) -> (...): the log-odds of being relevant."""
        raise NotImplementedError


HEADS: Registry[Head] = Registry("mmembed.heads", Head, given=("hidden_size",))
