"""Mixtures of positive and negative, attracted by the share of the one and repelled by that of the other (Metrix).

L = mean_{i, j} lambda d_ij + (1 - lambda) max(0, margin - d_ij),   d_ij = | q_i - m_ij |,   unit vectors
m_ij = lambda p_i + (1 - lambda) p_j on the unit sphere,   lambda ~ Beta(2, 2), one a step

(arXiv 2106.04990; the mixing of embeddings and its loss are read in the released code, whose distances are those of
pytorch-metric-learning: unit vectors, Euclidean.) j are the pairs that are no match of i; with `hardest` k, those of
them whose positives are the k nearest to q_i, as the paper mines negatives to mix. The mixtures lie where no
sample is, so that the space between a positive and a negative has an order too. There the term has weight 0.4 beside
the margin loss of the samples themselves; here it stands beside any objective: `[{type: infonce}, {type: metrix,
weight: 0.4}]`. Mixing of inputs and of features, which the paper has as well, is not here: texts have no mean. Lambda
follows from (seed, step): the second of three uniform numbers is Beta(2, 2). Cost: (N, N) floats a few times.

When: positives are few and what lies between a positive and a negative should be ordered as well.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs, generator_at
from mmembed.registry import Positive


class Metrix(Aligned):
    """Each query and the mixtures of its positive with others' positives, by how much of each is in them (Metrix).

    Args:
        margin: distance from which on a negative share repels no more, 0.5 in the released code.
        hardest: negatives a query that are mixed, the nearest ones; None: all of the batch.
        seed: of the shares.
    """

    name = "metrix"
    contrasts = True
    least_pairs = 2
    step: Tensor

    def __init__(
        self, margin: Annotated[float, Field(gt=0)] = 0.5, hardest: Positive | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.margin, self.hardest, self.seed = margin, hardest, seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = torch.rand(3, generator=generator_at(self.seed, int(self.step)))
        share = float(drawn.median())
        distances = mixed_distances(*pairs.unit, share)  # (N, N)
        pull, push = pull_and_push(distances, share, self.margin)
        others = ~pairs.same if self.hardest is None else nearest(*pairs.unit, ~pairs.same, self.hardest)
        loss = ((pull + push) * others).sum() / others.sum().clamp_min(1)
        return loss, {"mixed_distance": ((distances * others).sum() / others.sum().clamp_min(1)).detach()}

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)


def mixed_distances(queries: Tensor, positives: Tensor, share: float) -> Tensor:
    """Unit vectors (N, E) twice -> (N, N), of query i and the unit vector of share p_i + (1 - share) p_j.

    >>> mixed_distances(torch.eye(2), torch.eye(2), 0.5)  # a right angle's half: 2 sin(pi / 8)
    tensor([[0.0000, 0.7654],
            [0.7654, 0.0000]])
    """
    own = (queries * positives).sum(1, keepdim=True)  # (N, 1)
    products = share * own + (1 - share) * queries @ positives.T  # (N, N)
    squares = positives.square().sum(1)
    among = positives @ positives.T
    lengths = share**2 * squares[:, None] + (1 - share) ** 2 * squares[None, :] + 2 * share * (1 - share) * among
    tiny = torch.finfo(products.dtype).eps
    cosines = products / lengths.clamp_min(tiny).sqrt()
    return _root(2 - 2 * cosines)


def nearest(queries: Tensor, positives: Tensor, others: Tensor, count: int) -> Tensor:
    """Of the pairs `others` (N, N) of each query, the `count` whose positives are most similar to it.

    >>> nearest(torch.eye(2)[:1], torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), torch.tensor([[0, 1, 1]]) > 0, 1)
    tensor([[False,  True, False]])
    """
    similarities = (queries.detach() @ positives.detach().T).masked_fill(~others, -torch.inf)  # (N, N)
    best = similarities.topk(min(count, similarities.shape[1]), dim=1).indices
    return others & torch.zeros_like(others).scatter_(1, best, True)


def pull_and_push(distances: Tensor, share: float, margin: float) -> tuple[Tensor, Tensor]:
    """What the positive's share of a mixture attracts, and the negative's repels, each in the distances' shape.

    >>> [one.tolist() for one in pull_and_push(torch.tensor([0.5, 1.0]), 0.5, 0.75)]
    [[0.25, 0.5], [0.125, 0.0]]
    """
    return share * distances, (1 - share) * (margin - distances).clamp_min(0)


def _root(squares: Tensor) -> Tensor:
    """Square roots, with a gradient of 0 where there is nothing to take the root of."""
    above = squares > torch.finfo(squares.dtype).eps * 4
    return torch.where(above, squares, 1.0).sqrt() * above
