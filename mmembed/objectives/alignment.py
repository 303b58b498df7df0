"""Alignment: a query and its positive at one place, with nothing to keep the rest apart.

L = mean_i |q_i - p_i|^alpha

Over unit vectors (Wang and Isola, arXiv 2005.10242, eq. 6; alpha = 2 in their experiments, section 5). Alone it
collapses all vectors into one: add `uniformity` or a contrastive loss.

When: as a term beside one that spreads; alone it collapses.
"""

from __future__ import annotations

from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.registry import Above0


class Alignment(Aligned):
    """Pulls a query and its positive together; add something that spreads.

    Args:
        alpha: exponent of the distance.
    """

    name = "alignment"

    def __init__(self, alpha: Above0 = 2.0) -> None:
        super().__init__()
        self.alpha = alpha

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        return distance(queries, positives, self.alpha), {}


def distance(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
    """mean_i |a_i - b_i|^alpha of vectors (N, E)."""
    squared = (a - b).square().sum(-1).clamp_min(1e-12)  # the root of 0 has no gradient
    return squared.pow(alpha / 2).mean()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Vectors (N, E), (M, E) -> (N, M), at least 0."""
    return (a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.T).clamp_min(0)
