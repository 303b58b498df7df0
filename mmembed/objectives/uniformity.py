"""Uniformity: vectors spread over the sphere, with nothing to be close to.

L = 1/2 sum over both sides of log mean_{i<j} exp(-t |x_i - x_j|^2)

The Gaussian potential of Wang and Isola (arXiv 2005.10242, eq. 7), added to a contrastive loss in their experiments
with t = 2. Cost: (N, N) floats a side.

When: as a term with a small weight, where vectors crowd in a narrow cone (watch `effective_rank`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.alignment import squared_distances
from mmembed.registry import Above0


class Uniformity(Aligned):
    """Spreads queries among queries and positives among positives.

    Args:
        t: inverse width of the potential.
    """

    name = "uniformity"
    least_pairs = 2

    def __init__(self, t: Above0 = 2.0) -> None:
        super().__init__()
        self.t = t

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        return (potential(queries, self.t) + potential(positives, self.t)) / 2, {}


def potential(vectors: Tensor, t: float = 2.0) -> Tensor:
    """log mean_{i<j} exp(-t |x_i - x_j|^2) of vectors (N, E), N >= 2.

    >>> potential(torch.eye(2)).item()  # orthogonal: squared distance 2
    -4.0
    """
    squared = squared_distances(vectors, vectors)  # (N, N)
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1, device=vectors.device)
    pairs = squared[rows, columns]  # (N (N - 1) / 2,)
    return (-t * pairs).logsumexp(0) - torch.log(torch.tensor(float(len(pairs)), device=vectors.device))
