"""PRO: each candidate of a row above those of lower gold, the further apart in gold the more.

L = mean_k -log( e^{w_k s_k} / (e^{w_k s_k} + sum_j e^{w_j s_j}) ),    w_j = y_k - y_j,  w_k = max_j w_j

Over the anchors k that have candidates j of strictly lower gold, with s the similarity / temperature: CoDiEmb (arXiv
2508.11442), after preference ranking optimisation (arXiv 2306.17492). The sum over j is the same for all anchors of one
gold, so it is made once for each different gold of a row, in blocks, and again in the backward instead of being kept.
Cost: (levels, C) exponentials a row twice, half of them where all golds differ, and memory for a block a few times.

When: pairs carry a similarity and only their order counts; beside `pearson`, which sees the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmembed.losses import Loss, Scores

CELLS = 2**20  # of a block: 4 MB in float32


class PRO(Loss):
    """Each graded pair above those of lower gold, the further apart in gold the more.

    A row without two different golds gives 0.

    >>> values, gold = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(PRO()(Scores(values, gold, torch.ones(1, 2, dtype=torch.bool))).item(), 6)  # one anchor: log 2
    0.693147
    """

    name = "pro"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    objective = "pairs"
    needs_grades = True

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        gold = scores.relevance.to(scores.values.dtype).masked_fill(~scores.valid, torch.inf)
        gold, order = gold.sort(1)  # (Q, C) each, ascending
        values = scores.values.masked_fill(~scores.valid, 0.0).gather(1, order)
        valid = scores.valid.gather(1, order)
        below = torch.searchsorted(gold, gold)  # (Q, C), how many are of lower gold: the first ones of the row
        anchors = valid & (below > 0)
        first = anchors & (below == torch.arange(gold.shape[1], device=gold.device))  # of its level
        others: Tensor = _Lower.apply(values, gold, *first.nonzero(as_tuple=True))  # (G,), a row and level each
        of = (first.flatten().cumsum(0) - 1).view_as(below).gather(1, below.clamp_max(gold.shape[1] - 1))
        weights = (gold - gold[:, :1]).masked_fill(~anchors, 0.0)  # (Q, C), of the anchors themselves
        # -log(e^a / (e^a + e^b)) = softplus(b - a)
        losses = functional.softplus(functional.pad(others, (0, 1))[of] - weights * values)  # without levels of is -1
        return losses.masked_fill(~anchors, 0.0).sum(1) / anchors.sum(1).clamp_min(1)


class _Lower(torch.autograd.Function):
    """Values and gold (Q, C), ascending in gold, and G places (row, column) -> (G,): at each, the logsumexp over the
    columns before it of the gap in gold times the value. No gradient into the gold."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gold: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        others = values.new_empty(len(rows))  # (G,)
        for part, _, exponents, _ in _blocks(values, gold, rows, columns):
            highest = exponents.amax(1)  # (b,)
            others[part] = exponents.sub_(highest[:, None]).exp_().sum(1).log_() + highest
        ctx.save_for_backward(values, gold, rows, columns, others)
        return others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        values, gold, rows, columns, others = ctx.saved_tensors
        of_values = torch.zeros_like(values)
        for part, row, exponents, gaps in _blocks(values, gold, rows, columns):
            shares = exponents.sub_(others[part, None]).exp_().mul_(gaps)  # (b, c)
            target = of_values[:, : shares.shape[1]]
            if len(row) == 1:
                target[row[0]] += gradients[0][part] @ shares
            else:
                target.index_add_(0, row, shares.mul_(gradients[0][part, None]))
        return of_values, None, None, None


def _blocks(
    values: Tensor, gold: Tensor, rows: Tensor, columns: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Places in blocks: which, their rows (b,), or (1,) where that is one, exponents and gaps (b, c) of the c columns
    before the last of them. Exponents are low, but finite, from a place's own column on. The same memory in each turn:
    fresh pages would cost as much as the exponentials."""
    floor = torch.finfo(values.dtype).min / 2
    size = max(1, CELLS // max(1, values.shape[1]))
    room = values.new_empty(2, min(size, len(rows)) * values.shape[1])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        row, before = rows[part], columns[part]
        row = row[:1] if bool((row == row[0]).all()) else row
        width, common = int(before.max()), int(before.min())
        gaps, exponents = (one[: len(before) * width].view(len(before), width) for one in room)  # (b, c) each
        torch.sub(gold[rows[part], before][:, None], gold[row, :width], out=gaps)
        torch.mul(gaps, values[row, :width], out=exponents)
        own = torch.arange(common, width, device=before.device) >= before[:, None]  # (b, c - common)
        exponents[:, common:].masked_fill_(own, floor)
        yield part, row, exponents, gaps
