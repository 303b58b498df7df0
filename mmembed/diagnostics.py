"""What a set of vectors looks like: numbers that tell a healthy embedding space from a collapsed one.

Alignment and uniformity are those of Wang and Isola (arXiv 2005.10242, eq. 2 and 3), the effective rank is that of Roy
and Vetterli (EUSIPCO 2007), the modality gap that of Liang et al. (arXiv 2203.02053, section 2). Vectors are taken as
they come; normalise them first, all of these speak of directions. Cost: (N, N) distances for uniformity, a singular
value decomposition of (N, E) for the rank; callers bound N.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of N positive pairs (N, E), (N, E): 0 where they agree, 2 for unrelated directions."""
    return (a - b).square().sum(1).mean()


def uniformity(vectors: Tensor, t: float = 2.0) -> Tensor:
    """log mean_{i<j} exp(-t |x_i - x_j|^2) of (N, E): 0 where all are one point, about -2 t where directions are free.

    NaN for fewer than two vectors.
    """
    squared = torch.pdist(vectors).square()  # (N (N - 1) / 2,)
    return (-t * squared).logsumexp(0) - torch.tensor(float(len(squared))).log()


def effective_rank(vectors: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of (N, E): how many directions are really used.

    1 where all vectors lie on a line, min(N, E) where all directions count the same. NaN where values are not finite.
    """
    if not bool(torch.isfinite(vectors).all()):
        return torch.tensor(float("nan"))
    values = torch.linalg.svdvals(vectors.float())  # (min(N, E),)
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


def modality_gap(a: Tensor, b: Tensor) -> Tensor:
    """Distance of the centroids of (N, E) and (M, E): 0 where both fill the same region, up to 2."""
    return (a.mean(0) - b.mean(0)).norm()


def duplicate_rate(keys: Tensor) -> float:
    """Share of (N,) keys that occurred before."""
    return 1.0 - len(torch.unique(keys)) / len(keys)
