"""How vectors fill their space: beside alignment, uniformity, effective rank and the gap (`mmembed.diagnostics`).

All of these look at directions: vectors are brought to unit length by the caller, but for IsoScore, whose equation
takes them as they are. Cost: a decomposition of (E, E) each, but for the tolerance, O(N E).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmembed.errors import MmembedError

Floats = NDArray[np.float64]
SHARE = 0.8  # of the vectors a probe learns from


def tolerance(vectors: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Mean cosine of two contents of one class, and of two of different classes (Wang and Liu, arXiv 2012.09740).

    T = E[ x . y | label(x) = label(y) ]. High tolerance keeps what means the same together, and stands against
    uniformity. From the sums of the classes: sum_{i != j} x_i . x_j = |sum x|^2 - sum |x|^2.

    Args:
        vectors: (N, E) of unit length. labels: (N,).

    Raises:
        MmembedError: no class has two contents, or there is one class alone.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    _, group, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, group, rows)
    within = (sums**2).sum() - (rows**2).sum()  # over ordered pairs of one class
    across = (rows.sum(0) ** 2).sum() - (sums**2).sum()
    pairs = float((counts * (counts - 1)).sum())
    others = float(len(rows) ** 2 - (counts**2).sum())
    if not pairs or not others:
        raise MmembedError("tolerance: give at least two classes, and two contents of one of them")
    return float(within / pairs), float(across / others)


def mean_cosine(vectors: ArrayLike) -> float:
    """Anisotropy: the mean cosine of two contents (Ethayarajh, arXiv 1909.00512), 0 where directions are free.

    Args:
        vectors: (N, E) of unit length, N at least 2.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    return float(((rows.sum(0) ** 2).sum() - (rows**2).sum()) / (len(rows) * (len(rows) - 1)))


def isoscore(vectors: ArrayLike) -> float:
    """IsoScore (Rudman et al., arXiv 2108.07344, algorithm 1): 1 where all dimensions vary alike, 0 where one does.

    With the eigenvalues l of the covariance, l' = sqrt(E) l / |l|, defect d = |l' - 1| / sqrt(2 (E - sqrt E)),
    share s = (E - d^2 (E - sqrt E))^2 / E^2, and the score (E s - 1) / (E - 1). k of E dimensions that vary alike
    score (k - 1) / (E - 1).

    Args:
        vectors: (N, E), E at least 2, N well above E: fewer vectors than dimensions cannot fill them.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    size = rows.shape[1]
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False))
    norm = np.linalg.norm(values)
    if not norm > 0:
        return float("nan")
    widest = size - np.sqrt(size)
    defect = np.linalg.norm(np.sqrt(size) * values / norm - 1) / np.sqrt(2 * widest)
    share = (size - defect**2 * widest) ** 2 / size**2
    return float((size * share - 1) / (size - 1))


def partition_isotropy(vectors: ArrayLike) -> float:
    """min Z(c) / max Z(c), Z(c) = sum_x exp(c . x), c the eigenvectors of X^T X (Mu and Viswanath, arXiv 1702.01417).

    1 where the partition function is the same in all directions.

    Args:
        vectors: (N, E) of unit length.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    _, directions = np.linalg.eigh(rows.T @ rows)  # (E, E), a column each
    directions = np.concatenate([directions, -directions], axis=1)  # an eigenvector has two signs
    sums = np.exp(rows @ directions).sum(0)
    return float(sums.min() / sums.max())


def separability(a: ArrayLike, b: ArrayLike, seed: int = 0) -> float:
    """How well a linear probe tells two sets of contents apart: accuracy on a fifth that it has not seen.

    A logistic regression on four fifths (as of arXiv 2405.18570, which measures the gap of two modalities by it); the
    larger set is cut, so that chance is .5.

    Args:
        a: (N, E). b: (M, E). seed: of what is cut and of the parts.

    Raises:
        MmembedError: fewer than five contents a side.
    """
    from sklearn.linear_model import LogisticRegression

    sides = [np.asarray(side, dtype=np.float64) for side in (a, b)]
    size = min(map(len, sides))
    if size < 5:
        raise MmembedError(f"separability: {size} contents of a side; give at least 5")
    generator, learned = np.random.default_rng(seed), int(SHARE * size)
    drawn = [side[generator.permutation(len(side))[:size]] for side in sides]
    parts = [np.concatenate([side[:learned] for side in drawn]), np.concatenate([side[learned:] for side in drawn])]
    labels = [np.repeat([0, 1], learned), np.repeat([0, 1], size - learned)]
    probe = LogisticRegression(max_iter=1000).fit(parts[0], labels[0])
    return float(probe.score(parts[1], labels[1]))


def spectrum(vectors: ArrayLike) -> Floats:
    """(min(N, E),) share of the variance along each principal direction, largest first."""
    rows = np.asarray(vectors, dtype=np.float64)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    shares: Floats = values / values.sum()
    return shares
