"""Contrast of volumes: three or more modalities of a sample span a small body, those of different samples a large one.

vol = sqrt(det(A A^T)),    logits_ij = -vol(a_i, m_2j .. m_kj) / tau

A has the unit vectors of an anchor a and of the modalities m_2 .. m_k as rows; the loss is cross-entropy of the logits
both ways with label smoothing (GRAM, arXiv 2412.11959). The query is the anchor.

det = |a|^2 det(G) - g^T adj(G) g, with G the Gram matrix of the other modalities of j and g their products with a_i: no
matrix is inverted, so nothing happens where modalities coincide, and the root has an epsilon inside (the rounding of
the dtype), so its gradient stays finite there; the released code's is NaN. A volume cannot tell a vector from its
negative. Cost: (N, N) floats k (k + 1) / 2 times.

When: a sample has three modalities or more, and all of them should be near each other at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import both_ways
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Below1


class Gram(Aligned):
    """The volume that all modalities of a sample span is its score.

    Args:
        temperature: 0.07 (learned from there in the paper: `{value: 0.07, learn: true}`).
        modalities: how many are compared, the query among them; the others are the positives of a record in order.
        label_smoothing: 0.1 in the authors' code.
    """

    name = "gram"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        temperature: float | Mapping[str, Any] = 0.07,
        modalities: Annotated[int, Field(ge=3, le=5)] = 3,
        label_smoothing: Below1 = 0.1,
    ) -> None:
        super().__init__()
        self.temperature, self.label_smoothing = Temperature(temperature), label_smoothing
        self.positives_needed = modalities - 1

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        volume = volumes(pairs.unit_views[0], pairs.unit_views[1:])  # (N, N)
        loss = both_ways(-volume * self.temperature.scale(), pairs.same, self.label_smoothing).mean()
        return loss, {"volume": volume.diagonal().mean().detach()}


def volumes(anchors: Tensor, modalities: Tensor) -> Tensor:
    """Vectors (N, E) and (K, M, E) -> (N, M) volumes of anchor i with the modalities of sample j.

    >>> volumes(torch.tensor([[1.0, 0, 0]]), torch.tensor([[[0, 1.0, 0]], [[0, 0, 1.0]]]))
    tensor([[1.]])
    """
    gram = torch.einsum("kme,lme->mkl", modalities, modalities)  # (M, K, K)
    cosines = torch.einsum("ne,kme->knm", anchors, modalities)  # (K, N, M)
    squared = anchors.square().sum(1)[:, None] * determinant(gram)  # (N, M)
    for row in range(len(modalities)):
        for column in range(row, len(modalities)):
            twice = 1 if row == column else 2
            squared = squared - twice * cofactor(gram, row, column) * cosines[row] * cosines[column]
    return (squared.clamp_min(0) + torch.finfo(squared.dtype).eps).sqrt()


def determinant(matrix: Tensor) -> Tensor:
    """(..., K, K) -> (...), by its first row: exact gradients for small K, singular or not."""
    size = matrix.shape[-1]
    if size == 0:
        return matrix.new_ones(matrix.shape[:-2])
    parts = [matrix[..., 0, column] * cofactor(matrix, 0, column) for column in range(size)]
    return torch.stack(parts).sum(0)


def cofactor(matrix: Tensor, row: int, column: int) -> Tensor:
    """(..., K, K) -> (...), the signed determinant without a row and a column."""
    kept = [[place for place in range(matrix.shape[-1]) if place != left] for left in (row, column)]
    return (-1.0) ** (row + column) * determinant(matrix[..., kept[0], :][..., kept[1]])
