"""What the losses share: sums over some candidates of a row that are exact, and finite where there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """(Q, C) with the smallest usable number outside of the mask: not -inf, whose differences are NaN."""
    return torch.where(mask, values, torch.finfo(values.dtype).min / 2)


def logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """(Q, C) -> (Q,) over the mask; far below all numbers where a row has none."""
    return masked(values, mask).logsumexp(1)


def against(values: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, C) -> `logsumexp` over the mask (Q,), and the values at some cells outside of it (P,).

    As one function, because the gradients of both are one (Q, C): half the passes over it.
    """
    found: tuple[Tensor, Tensor] = _Against.apply(values, mask, rows, columns)
    return found


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


class _Against(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        kept = masked(values, mask)  # (Q, C)
        total = kept.logsumexp(1)  # (Q,)
        ctx.save_for_backward(kept, total, rows, columns)
        return total, values[rows, columns]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        kept, total, rows, columns = ctx.saved_tensors
        empty = total <= torch.finfo(total.dtype).min / 4  # rows without a cell of the mask
        share = (kept - total[:, None]).exp_().mul_(gradients[0].masked_fill(empty, 0.0)[:, None])  # (Q, C)
        return share.index_put_((rows, columns), gradients[1], accumulate=True), None, None, None
