"""The mean of losses of rows over a product of two matrices, without keeping the product.

L = mean_i l(a_i B^T),  (Q, E) and (C, E)

Where the loss of a row depends on no other row, rows are taken in blocks: scores, loss and gradient of a block are made
while its numbers are in the cache, and (Q, E) and (C, E) are what stays. The gradient is computed with the loss, so a
backward costs two sums. Cost: three products, as for the whole matrix, and memory for a block of scores a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CELLS = 2**22  # scores of a block: 16 MB in float32
RowLosses = Callable[[Tensor, slice, Tensor], Tensor]


def blocked_mean(left: Tensor, right: Tensor, temperature: Tensor, losses_of: RowLosses) -> Tensor:
    """-> scalar.

    Args:
        left, right: (Q, E), (C, E).
        temperature: scalar, handed on to `losses_of`, with a gradient where it is learned.
        losses_of: (scores (b, C), rows of `left` that they belong to, temperature) -> (b,) losses.
    """
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in (left, right, temperature))
    mean: Tensor = _BlockedMean.apply(left, right, temperature, losses_of, wanted)
    return mean


@contextmanager
def cells_of_a_block(cells: int) -> Iterator[None]:
    """Other blocks, for a plan that measures a small comparison and scales it: what a block takes scales with it."""
    global CELLS
    before, CELLS = CELLS, max(1, cells)
    try:
        yield
    finally:
        CELLS = before


class _BlockedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, temperature: Tensor, losses_of: RowLosses, wanted: bool
    ) -> Tensor:
        count = max(1, len(left))
        total = left.new_zeros(())
        if wanted:
            of_left, of_right = torch.empty_like(left), torch.zeros_like(right)
            of_temperature = torch.zeros_like(temperature)
        with torch.autocast(left.device.type, enabled=False):
            for rows in _blocks(len(left), len(right)):
                scores = left[rows] @ right.T  # (b, C)
                if not wanted:
                    total += losses_of(scores, rows, temperature).sum()
                    continue
                gradient, more, losses = _gradients(scores, rows, temperature, losses_of)
                total += losses.sum()
                of_temperature += more
                torch.mm(gradient, right, out=of_left[rows])
                of_right.addmm_(gradient.T, left[rows])
        if wanted:
            ctx.save_for_backward(of_left, of_right, of_temperature)
            ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_left, of_right, of_temperature = (gradients[0] / ctx.count * one for one in ctx.saved_tensors)
        return of_left, of_right, of_temperature, None, None


def _gradients(scores: Tensor, rows: slice, temperature: Tensor, losses_of: RowLosses) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sum of a block's losses: with respect to scores and temperature, and the losses."""
    with torch.enable_grad():
        leaves = [scores.requires_grad_(), temperature.detach().requires_grad_()]
        losses = losses_of(leaves[0], rows, leaves[1])
        found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return found[0], found[1], losses.detach()


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, CELLS // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
