"""LambdaRank: RankNet's pairs, each with what exchanging its two documents would change of nDCG.

L_i = sum_{(a, b) in P} w_ab log( 1 + e^{s_b - s_a} ),  P = { (a, b): r_a > r_b }

w_ab = |2^{r_a} - 2^{r_b}| |1 / log2(1 + rank_a) - 1 / log2(1 + rank_b)| / DCG_ideal

Burges et al., "Learning to rank with nonsmooth cost functions" (NeurIPS 2006). Ranks are those of the present scores
and have no gradient. With `k` places behind the k-th are worth nothing. Cost: (Q, C, C) cells.

When: graded documents, and nDCG is what counts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.ranknet import pair_losses
from mmembed.registry import Positive


class LambdaRank(Loss):
    """RankNet's pairs by what exchanging them would change of nDCG.

    Args:
        k: of nDCG@k; None: of the whole list.

    >>> valid = torch.ones(1, 2, dtype=torch.bool)
    >>> LambdaRank()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid))  # log 2 (1 - 1 / log2 3)
    tensor([0.2558])
    """

    name = "lambdarank"
    objective = "ranking"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    orders = True
    least_candidates = 2

    def __init__(self, k: Positive | None = None) -> None:
        super().__init__()
        self.k = k

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row of one grade."""
        losses, pairs = pair_losses(scores)
        return (losses * self._weights(scores)).masked_fill(~pairs, 0.0).sum((1, 2))

    @torch.no_grad()
    def _weights(self, scores: Scores) -> Tensor:
        """(Q, C, C)."""
        gains = torch.exp2(scores.relevance).sub(1).masked_fill(~scores.valid, 0.0)  # (Q, C)
        discounts = self._discounts(scores.values.masked_fill(~scores.valid, -torch.inf))
        ideal = (gains * self._discounts(gains)).sum(1).clamp_min(torch.finfo(gains.dtype).tiny)  # (Q,)
        changed = (gains[:, :, None] - gains[:, None]) * (discounts[:, :, None] - discounts[:, None])
        return changed.abs() / ideal[:, None, None]

    def _discounts(self, values: Tensor) -> Tensor:
        """(Q, C) of the ranks that these numbers give, ties by the column."""
        ranks = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1  # (Q, C)
        discounts = 1 / torch.log2(1 + ranks.to(values.dtype))
        return discounts if self.k is None else discounts.masked_fill(ranks > self.k, 0.0)
