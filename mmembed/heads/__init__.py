"""Heads of rerankers: the last hidden state of a pair of query and document -> logits, and these -> one score.

A reranker is the embedding model of pairs whose vector is its head's logits, so it trains, is saved and resumed as an
embedder is. One file per head; `HEADS.build("yes_no", hidden_size=H)`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmembed.registry import Registry


class Head(nn.Module):
    """Base of the heads: (B, H) -> (B, L) logits, without bias. Weights that are not trained are a buffer, which no
    engine divides; with `trained` None there are none.

    logits: L.
    lists: whether it reads the documents of a query together, from attention and not from hidden states.
    words: of which the weights are the backbone's own output embeddings; none: the weights are fresh.
    """

    name: ClassVar[str]
    logits: ClassVar[int]
    lists: ClassVar[bool] = False

    def __init__(self, hidden_size: int, trained: bool | None) -> None:
        super().__init__()
        if trained is None:
            return
        weight = torch.randn(self.logits, hidden_size) * hidden_size**-0.5  # (L, H)
        self.weight: Tensor
        if trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)

    @property
    def words(self) -> tuple[str, ...]:
        return ()


def log_odds(logits: Tensor) -> Tensor:
    """(..., L) -> (...): of being relevant; the difference of two logits, or the one that there is."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 0] - logits[..., 1]


HEADS: Registry[Head] = Registry("mmembed.heads", Head, given=("hidden_size",))
