"""Pearson: the similarities of a row on a line with the gold.

L = 1 - cov(s, y) / (sd(s) sd(y))

Both standard deviations are biased, as in CoDiEmb (arXiv 2508.11442; the weights 2 for this loss, 0.5 for `pro` and 5
for `rank_kl` are in the training code of Youtu-Embedding, not in the paper). No temperature moves it, and a config
that gives one is refused. Cost: a few passes over (Q, C).

When: pairs carry a similarity (STS) that should be matched linearly; beside `rank_kl` and `pro` as in CoDiEmb.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmembed.losses import Loss, Scores

LEAST = 1e-8  # variance below which similarities count as equal: their correlation would be noise of huge gradient


class Pearson(Loss):
    """Correlation of the similarities of graded pairs with their gold.

    A row whose gold is constant gives 0 with a gradient of 0: processes that reduce gradients wait for no one.

    >>> values, gold = torch.tensor([[0.8, 0.4, 0.6]]), torch.tensor([[1.0, 0.0, 0.5]])
    >>> round(Pearson()(Scores(values, gold, torch.ones(1, 3, dtype=torch.bool))).item(), 6)  # on a line
    0.0
    """

    name = "pearson"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    objective = "pairs"
    needs_grades = True
    tempered = False

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        found, constant = correlation(scores)
        return torch.where(constant, found, 1 - found)  # (Q,)


def correlation(scores: Scores) -> tuple[Tensor, Tensor]:
    """Of the values with the relevance of each row (Q,), 0 where that is constant; where that is so (Q,) bool."""
    gold = scores.relevance.to(scores.values.dtype)  # (Q, C)
    highest = gold.masked_fill(~scores.valid, -torch.inf).amax(1)  # (Q,)
    lowest = gold.masked_fill(~scores.valid, torch.inf).amin(1)
    constant = highest <= lowest  # by comparison: the variance of equal numbers is not exactly 0
    values, gold = _centred(scores.values, scores.valid), _centred(gold, scores.valid)  # (Q, C) each
    count = scores.valid.sum(1).clamp_min(1)  # (Q,)
    variances = [part.square().sum(1) / count for part in (values, gold)]
    spread = (variances[0].clamp_min(LEAST) * variances[1].clamp_min(LEAST)).sqrt()  # (Q,)
    covariance = (values * gold).sum(1) / count
    return torch.where(constant, 0 * covariance, covariance / spread), constant


def _centred(tensor: Tensor, valid: Tensor) -> Tensor:
    kept = tensor.masked_fill(~valid, 0.0)
    mean = kept.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)  # (Q, 1)
    return (kept - mean).masked_fill(~valid, 0.0)
