"""One fresh row of weights: a cross-encoder's usual head (Nogueira and Cho, arXiv 1901.04085).

z = w . h        h the last hidden state of the pair

When: the backbone has no output embedding, no two words that are one token each, or no opinion worth keeping.
"""

from __future__ import annotations

from mmembed.heads import Head


class LinearHead(Head):
    """One trained row, fresh."""

    name = "linear"
    logits = 1

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, trained=True)
