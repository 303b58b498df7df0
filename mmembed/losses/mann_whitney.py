"""Mann-Whitney: every positive of the batch above every negative of the batch, whosever row it stands in.

L_i = 1/|P_i| sum_p mean_{(k, j) in N} softplus(s_kj - s_ip),  N = all valid negatives of all rows

The area under the ROC curve of pooled scores, with log sigmoid for the step: 1 - AUC <= L / log 2 (arXiv 2510.00137,
eq. 3). InfoNCE compares within a row, so a shift of all scores of a query costs it nothing; here it does, which makes
scores comparable between queries (a threshold, filtering). Because negatives cross rows, false negatives hurt across
rows too: keep `mask_duplicates` on. The temperature is the paper's .01 unless a config says otherwise.

Cost: P positives times |N| negatives, 5e11 for 4,096 queries with 32,768 candidates each. Both sums are functions of
one number that are smooth on the scale of 1, so beyond 2^24 comparisons the negatives are counted in cells of width
1/16 with their first three moments about the middle (Taylor's formula: relative error under 1e-7) and positives meet
cells: a few passes over (Q, C) in blocks, nothing of size P x |N|. Gradients come from the same formula.

When: scores of different queries are compared: one threshold for all, filtering, deduplication.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import mean_of_positives

COMPARISONS = 2**24  # up to as many are made one by one
STEP = 1 / 16  # width of a cell
BLOCK = 2**22  # numbers alive at once


class MannWhitney(Loss):
    """AUC over the pooled scores of all queries; for scores that must mean the same for every query.

    Args:
        reduction: `mean` over the negatives (default), or `sum`, as equation 3 is printed: its size grows with the
            square of the batch.

    Rows are coupled. A row without a positive gives 0; its negatives count.

    >>> values, valid = torch.tensor([[2.0, 0.0], [5.0, 5.0]]), torch.ones(2, 2, dtype=torch.bool)
    >>> MannWhitney()(Scores(values, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), valid))  # 0 and 5 against 2, against 5
    tensor([1.5878, 0.3499])
    """

    name = "mann_whitney"
    couples_rows: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"temperature": 0.01}

    def __init__(self, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        rows, columns = scores.cells  # (P,) each
        negative = scores.negative  # (Q, C)
        count = negative.sum().clamp_min(1) if self.reduction == "mean" else 1
        losses: Tensor = _SumOverNegatives.apply(scores.values[rows, columns], scores.values, negative)
        return mean_of_positives(losses / count, rows, len(scores.values))


class _SumOverNegatives(torch.autograd.Function):
    """(P,) positives, (Q, C) values and which are negatives -> (P,) sums of softplus(negative - positive)."""

    @staticmethod
    def forward(ctx: Any, positives: Tensor, values: Tensor, negative: Tensor) -> Tensor:
        cells = _cells(positives, values, negative)
        ctx.save_for_backward(positives, values, negative)
        ctx.cells = cells
        if not len(positives):
            return torch.zeros_like(positives)
        total, ctx.slopes = _against_negatives(positives, values, negative, cells)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        positives, values, negative = ctx.saved_tensors
        if not len(positives):
            return torch.zeros_like(positives), torch.zeros_like(values), None
        of_values = _against_positives(positives, gradients[0], values, negative, ctx.cells)  # (Q, C)
        return -gradients[0] * ctx.slopes, of_values, None


def _cells(positives: Tensor, values: Tensor, negative: Tensor) -> Tensor | None:
    """Middles of the cells that hold all negatives, (B,) float64; None where comparing one by one is cheaper."""
    count = int(negative.sum())
    if count * len(positives) <= COMPARISONS:
        return None
    low = values.masked_fill(~negative, float("inf")).amin().double()
    high = values.masked_fill(~negative, float("-inf")).amax().double()
    number = float((high - low) / STEP) + 2
    if not number < count:  # NaN is not, either
        return None
    return low + STEP * torch.arange(int(number), dtype=torch.float64, device=values.device)


def _against_negatives(
    positives: Tensor, values: Tensor, negative: Tensor, cells: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of each positive x: sum_j softplus(s_j - x) and sum_j sigmoid(s_j - x) over the negatives, (P,) each."""
    if cells is None:
        places, moments = values[negative], None  # (N,)
    else:
        places, moments = cells, _moments(values, negative, cells)  # (B,), (4, B)
    totals, slopes = [], []
    for part in positives.split(max(1, BLOCK // max(1, len(places)))):
        difference = places[None, :] - part[:, None].to(places.dtype)  # (p, N) or (p, B)
        if moments is None:
            totals.append(functional.softplus(difference).sum(1))
            slopes.append(torch.sigmoid(difference).sum(1))
        else:
            first, second, third, fourth = _derivatives(difference)
            totals.append(functional.softplus(difference) @ moments[0])
            totals[-1] += first @ moments[1] + second @ moments[2] + third @ moments[3]
            slopes.append(first @ moments[0] + second @ moments[1] + third @ moments[2] + fourth @ moments[3])
    return torch.cat(totals).to(values.dtype), torch.cat(slopes).to(values.dtype)


def _against_positives(
    positives: Tensor, weights: Tensor, values: Tensor, negative: Tensor, cells: Tensor | None
) -> Tensor:
    """sum_p w_p sigmoid(s - x_p) at each negative score s, 0 elsewhere -> (Q, C)."""
    places = values[negative] if cells is None else cells  # (N,) or (B,)
    found = []
    for part in places.split(max(1, BLOCK // len(positives))):
        difference = part[:, None] - positives[None, :].to(places.dtype)  # (n, P) or (b, P)
        if cells is None:
            found.append(torch.sigmoid(difference) @ weights)
        else:
            found.append(torch.stack([of @ weights.double() for of in _derivatives(difference)]))
    if cells is None:
        return torch.zeros_like(values).masked_scatter_(negative, torch.cat(found) if found else places)
    table = torch.cat(found, dim=1).to(values.dtype)  # (4, B)
    slopes = torch.empty_like(values)
    for rows in _blocks(values):
        index, offset = _places(values[rows], negative[rows], cells)
        terms = (table[3][index] * offset / 3 + table[2][index]) * offset / 2 + table[1][index]
        slopes[rows] = (terms * offset + table[0][index]).masked_fill_(~negative[rows], 0.0)
    return slopes


def _moments(values: Tensor, negative: Tensor, cells: Tensor) -> Tensor:
    """sum of offset^n / n! over the negatives of each cell, n = 0 ... 3 -> (4, B) float64."""
    moments = torch.zeros(4, len(cells), dtype=torch.float64, device=values.device)
    for rows in _blocks(values):
        index, offset = _places(values[rows], negative[rows], cells)
        index, term = index.flatten(), negative[rows].double().flatten()
        for order in range(4):
            moments[order].index_add_(0, index, term)
            term = term * offset.flatten() / (order + 1)
    return moments


def _places(values: Tensor, negative: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The cell of each value and the offset from its middle; anything in range where it is no negative."""
    scaled = ((values.double() - cells[0]) / STEP).masked_fill(~negative, 0.0)
    index = scaled.round()
    return index.long(), ((scaled - index) * STEP).to(values.dtype)


def _blocks(values: Tensor) -> list[slice]:
    rows = max(1, BLOCK // max(1, values.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


def _derivatives(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four derivatives of softplus."""
    first = torch.sigmoid(x)
    second = first * (1 - first)
    return first, second, second * (1 - 2 * first), second * (1 - 6 * second)
