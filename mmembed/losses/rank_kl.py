"""Rank-KL: a softmax over the gold ranks of a row, matched by the softmax over its similarities.

L   = KL( softmax(t / tau) || softmax(s / tau) ) / N
t_i = (N - 1 - r_i) / (N - 1)

r_i is the average rank of y_i (0 is the highest, equal ones share). As in CoDiEmb (arXiv 2508.11442). The division by N
is that of the released code (`batchmean` of a row): its weight 5 means 5 / N, so the batch size moves the mix. Cost: a
sort of (Q, C).

When: pairs carry a similarity and Spearman's correlation is what is measured.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.registry import Above0


class RankKL(Loss):
    """Distribution over graded pairs that should be that of their gold ranks.

    Args:
        temperature_of_ranks: what the gold ranks are divided by; CoDiEmb takes that of the similarities.
        reduction: `mean` divides by the candidates of the row (released), `sum` is the divergence itself.

    >>> values, gold = torch.tensor([[20.0, 10.0, 0.0]]), torch.tensor([[0.9, 0.5, 0.2]])  # similarity / temperature
    >>> round(RankKL()(Scores(values, gold, torch.ones(1, 3, dtype=torch.bool))).item(), 6)  # the very ranks
    0.0
    """

    name = "rank_kl"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    objective = "pairs"
    needs_grades = True

    def __init__(
        self,
        temperature_of_ranks: Above0 = 0.05,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.temperature_of_ranks, self.reduction = temperature_of_ranks, reduction

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        floor = torch.finfo(scores.values.dtype).min / 2  # not -inf: a row without candidates must give 0, not NaN
        count = scores.valid.sum(1, keepdim=True)  # (Q, 1)
        ideal = (count - 1 - ranks(scores)) / (count - 1).clamp_min(1)  # (Q, C)
        wanted = (ideal / self.temperature_of_ranks).to(scores.values.dtype).masked_fill(~scores.valid, floor)
        wanted = wanted.log_softmax(1)
        found = scores.values.masked_fill(~scores.valid, floor).log_softmax(1)
        losses = (wanted.exp() * (wanted - found)).masked_fill(~scores.valid, 0.0).sum(1)  # (Q,)
        return losses / count.squeeze(1).clamp_min(1) if self.reduction == "mean" else losses


def ranks(scores: Scores) -> Tensor:
    """(Q, C) average ranks of the relevance among the valid candidates, 0 is the highest; any value where not valid."""
    gold = scores.relevance.masked_fill(~scores.valid, -torch.inf)  # (Q, C)
    ascending = gold.sort(1).values
    above = gold.shape[1] - torch.searchsorted(ascending, gold, right=True)  # (Q, C)
    equal = gold.shape[1] - above - torch.searchsorted(ascending, gold)  # itself among them
    return (above + (equal - 1) / 2).to(scores.values.dtype)  # halves are exact
