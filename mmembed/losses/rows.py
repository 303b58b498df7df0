"""What the losses share: sums over some candidates of a row that are exact, and finite where there are none."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """(Q, C) with the smallest usable number outside of the mask: not -inf, whose differences are NaN."""
    return values.masked_fill(~mask, torch.finfo(values.dtype).min / 2)


def logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """(Q, C) -> (Q,) over the mask; far below all numbers where a row has none."""
    return masked(values, mask).logsumexp(1)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """(Q, C) -> (Q,) over the mask; 0 where a row has none."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def mean_of_positives(losses: Tensor, rows: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """(P,) losses of positives that stand in `rows` (P,) -> (count,) means of the rows, 0 for a row without one.

    weights: (P,) of the positives, above 0; alike by default.
    """
    weights = torch.ones_like(losses) if weights is None else weights
    total = weights.new_zeros(count).index_add(0, rows, weights)  # (count,)
    return losses.new_zeros(count).index_add(0, rows, losses * weights / total[rows])
