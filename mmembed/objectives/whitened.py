"""Contrast of vectors whose directions a batch has decorrelated in shuffled groups (WhitenedCSE, arXiv 2305.17746).

Dimensions are permuted, cut into groups, each group is whitened with the statistics of the batch (ZCA, covariance
divided by N) and put back in place. Whitenings of one vector under different permutations are different views of it:

L = sum_{k=1}^{K} InfoNCE( W_0(queries), W_k(positives), tau ),  a sum and no mean, as in the authors' code

As there, no gradient flows through the covariance. Permutations follow from (seed, step), so a resumed run draws those
that it would have drawn. Groups must be much narrower than the batch: an N of the group's size or less is refused, and
directions with less than 1e-5 of the group's largest variance are not blown up. What is saved and searched is the
embedding itself. Cost: (N, N) floats and E / group_size decompositions of (group_size, group_size), K + 1 times.

When: vectors of a frozen or lightly trained backbone are anisotropic and batches hold 64 or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.objectives.aligned import Aligned, Pairs, generator_at
from mmembed.objectives.softmax import info_nce
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Positive

SMALLEST = 1e-5  # share of the largest variance


class Whitened(Aligned):
    """InfoNCE between group-whitened queries and several whitenings of the positives.

    Args:
        temperature: 0.05, of the paper.
        group_size: dimensions that are whitened together; 6 in the paper (768 in 128 groups).
        views: whitenings of the positives (2 in the paper).
        seed: of the permutations.
    """

    name = "whitened"
    contrasts = True
    step: Tensor

    def __init__(
        self,
        temperature: float | Mapping[str, Any] = 0.05,
        group_size: Positive = 6,
        views: Positive = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.group_size, self.views, self.seed = Temperature(temperature), group_size, views, seed
        self.least_pairs = group_size + 1
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        size = pairs.queries.shape[1]
        generator = generator_at(self.seed, int(self.step))
        orders = [torch.randperm(size, generator=generator) for _ in range(1 + self.views)]
        anchor = functional.normalize(whiten(pairs.queries, self.group_size, orders[0]), dim=-1)
        terms = []
        for order in orders[1:]:
            view = functional.normalize(whiten(pairs.positives, self.group_size, order), dim=-1)
            terms.append(info_nce(anchor @ view.T * self.temperature.scale(), pairs.same).mean())
        return torch.stack(terms).sum(), {"first_view": terms[0].detach()}

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)


def whiten(vectors: Tensor, group_size: int, order: Tensor | None = None) -> Tensor:
    """(N, E) -> (N, E) whose groups of dimensions, taken in `order` (E,), have the identity as covariance.

    The last group is narrower where `group_size` does not divide E.

    >>> whiten(torch.tensor([[1.0], [3.0]]), 1)
    tensor([[-1.],
            [ 1.]])
    """
    size = vectors.shape[1]
    order = torch.arange(size) if order is None else order
    order = order.to(vectors.device)
    shuffled = vectors[:, order]
    whole = size - size % group_size
    groups = shuffled[:, :whole].unflatten(1, (-1, group_size)) if whole else shuffled[:, :0].unsqueeze(1)
    parts = [_zca(groups).flatten(1)] if whole else []
    if whole < size:
        parts.append(_zca(shuffled[:, None, whole:]).flatten(1))
    return torch.cat(parts, dim=1)[:, order.argsort()]


def _zca(groups: Tensor) -> Tensor:
    """(N, G, W) -> the same, each group whitened."""
    centred = groups - groups.mean(0)
    with torch.no_grad():
        covariance = torch.einsum("ngw,ngv->gwv", centred, centred) / len(groups)  # (G, W, W)
        variances, directions = torch.linalg.eigh(covariance)  # (G, W), (G, W, W)
        floor = variances.amax(1, keepdim=True).clamp_min(torch.finfo(variances.dtype).tiny) * SMALLEST
        roots = variances.maximum(floor).rsqrt()
        matrix = directions * roots.unsqueeze(1) @ directions.mT  # (G, W, W)
    return torch.einsum("ngw,gwv->ngv", centred, matrix)
