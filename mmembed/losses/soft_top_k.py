"""Soft top-k: the probability of being among the k best candidates.

p_ij = sigmoid(alpha (s_ij + t_i)) with t_i such that sum_j p_ij = k;  L_i = 1/|P_i| sum_p -log p_ip

DEXML (arXiv 2310.10636). The gradient through t is that of the implicit function: dp/ds = diag(v) - v v^T / sum v,
v = alpha p (1 - p). t is found by Newton steps kept inside a bracket, which halve it where they would leave it. The
released code masks with -100, here masked cells are out. Cost: the k best of each row and some passes over (Q, C)
without gradients, in blocks of rows, then two sigmoids with them.

When: what counts is whether positives are among the first k, not where (recall@k).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import mean_of_positives
from mmembed.registry import Above0, Positive

STEPS = 60  # bisection alone reaches float64 from a bracket of 1,000 in as many
CELLS = 2**22  # alive at once in the search for t


class SoftTopK(Loss):
    """Every positive among the k best of its row; how far up does not matter.

    Args:
        k: how many places there are (5 in the released code). A row with k or fewer candidates gives 0.
        alpha: steepness of the sigmoid (2 in the released code).

    >>> values, valid = torch.tensor([[4.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> SoftTopK(k=2)(Scores(values, torch.tensor([[1.0, 0.0, 0.0]]), valid))  # surely among two
    tensor([0.0003])
    """

    name = "soft_top_k"

    def __init__(self, k: Positive = 5, alpha: Above0 = 2.0) -> None:
        super().__init__()
        self.k, self.alpha = k, alpha
        self.least_candidates = k + 1

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive or with k candidates or fewer."""
        threshold: Tensor = _Threshold.apply(scores.values, scores.valid, self.k, self.alpha)
        contested = scores.valid.sum(1) > self.k  # (Q,)
        rows, columns = (scores.positive & contested[:, None]).nonzero(as_tuple=True)  # (P,) each
        losses = functional.softplus(-self.alpha * (scores.values[rows, columns] + threshold[rows]))  # (P,)
        return mean_of_positives(losses, rows, len(scores.values))


class _Threshold(torch.autograd.Function):
    """(Q, C) values -> (Q,) t; 0 without a gradient in rows that have no more than k candidates."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, valid: Tensor, k: int, alpha: float) -> Tensor:
        block = max(1, CELLS // max(1, values.shape[1]))
        found = [
            solve(part, mask, k, alpha) for part, mask in zip(values.split(block), valid.split(block), strict=True)
        ]
        threshold = torch.cat(found) if found else values.new_zeros(0)  # (Q,)
        ctx.save_for_backward(values, valid, threshold)
        ctx.k, ctx.alpha = k, alpha
        return threshold

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, valid, threshold = ctx.saved_tensors
        places = ctx.alpha * (values + threshold[:, None])  # (Q, C)
        slope = (torch.sigmoid(places) * torch.sigmoid(-places)).masked_fill_(~valid, 0.0)  # 1 - p would round to 0
        of_row = gradients[0] / slope.sum(1).clamp_min(torch.finfo(values.dtype).tiny)  # (Q,)
        of_row = of_row.masked_fill(valid.sum(1) <= ctx.k, 0.0)
        return slope.mul_(-of_row[:, None]), None, None, None


def solve(values: Tensor, valid: Tensor, k: int, alpha: float) -> Tensor:
    """(Q, C) -> t (Q,) with sum_j sigmoid(alpha (s_ij + t_i)) = k over the valid; 0 where there are k or fewer.

    Where a gap parts the k best from the others, that sum is k to all digits anywhere in the gap. So the equation that
    is solved is what the others have of a place = what the k best lack of theirs: sums of small numbers, in logarithms.
    """
    count = valid.sum(1)  # (Q,)
    contested = count > k
    if not contested.any():
        return values.new_zeros(len(values))
    tiny = torch.finfo(values.dtype).tiny
    best, places = values.masked_fill(~valid, -torch.inf).topk(k, 1)  # (Q, k)
    others = values.masked_fill(~valid, -torch.inf).scatter_(1, places, -torch.inf)  # (Q, C)
    zeros = values.new_zeros(())
    best = best.where(contested[:, None], zeros)
    highest, lowest = best[:, 0], values.masked_fill(~valid, torch.inf).amin(1).where(contested, zeros)  # (Q,)
    share = (k / count.clamp_min(k + 1)).to(values.dtype).logit() / alpha  # were all scores equal: t = share - score
    low, high = share - highest, share - lowest  # sum <= k at low, >= k at high
    t = (-(best[:, -1] + others.amax(1).where(contested, zeros)) / 2).clamp(low, high)
    enough = 4 * torch.finfo(values.dtype).eps
    for _ in range(STEPS):
        p = torch.sigmoid(alpha * (others + t[:, None]))  # (Q, C), places that the others have
        q = torch.sigmoid(-alpha * (best + t[:, None]))  # (Q, k), places that the best lack
        had, lacked = p.sum(1).clamp_min(tiny), q.sum(1).clamp_min(tiny)
        error = had.log() - lacked.log()  # (Q,), rises with t
        slope = alpha * ((p - p.square()).sum(1) / had + (q - q.square()).sum(1) / lacked)
        low, high = torch.where(error <= 0, t, low), torch.where(error >= 0, t, high)
        step = t - error / slope.clamp_min(tiny)
        inside = (step >= low) & (step <= high)
        following = torch.where(inside, step, (low + high) / 2)
        moved = (following - t).abs().where(contested, zeros)
        t = following
        if bool((moved <= enough * (1 + t.abs())).all()):
            break
    return t.where(contested, zeros)
