"""A classifier without training: Gaussian discriminant analysis on embeddings (Wang et al., arXiv 2402.04087).

Classes are Gaussians of one covariance S around their means mu; with a precision that is ridged as the authors' code
has it, whatever the number of examples,

    P = E pinv((N - 1) S + tr(S) I),  logit_c = x . P mu_c + log pi_c - mu_c . P mu_c / 2

where S is the unbiased estimate over the N centred examples and pi is uniform. With descriptions of the classes the
logits are added to zero-shot ones: 100 x . t_c + alpha logit_c. Cost: one pseudo-inverse of (E, E) in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmembed.errors import MmembedError

Floats = NDArray[np.float64]
SCALE = 100.0  # of zero-shot cosines, CLIP's


@dataclass(frozen=True)
class Discriminant:
    """A linear classifier of C classes.

    Attributes:
        classes: (C,) labels. weights: (C, E). bias: (C,).
    """

    classes: NDArray[np.generic]
    weights: Floats
    bias: Floats

    def logits(self, vectors: ArrayLike) -> Floats:
        """(N, E) -> (N, C)."""
        return np.asarray(vectors, dtype=np.float64) @ self.weights.T + self.bias

    def predict(self, vectors: ArrayLike) -> NDArray[np.generic]:
        """(N, E) -> (N,) labels."""
        return self.classes[self.logits(vectors).argmax(1)]


def fit(vectors: ArrayLike, labels: ArrayLike) -> Discriminant:
    """A classifier from labelled vectors (N, E), (N,).

    Raises:
        MmembedError: fewer than two classes, or no class has two examples: nothing has a covariance.
    """
    rows, known = np.asarray(vectors, dtype=np.float64), np.asarray(labels)
    classes, group, counts = np.unique(known, return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.max() < 2:
        raise MmembedError("gda: give two classes or more, and two examples of one of them")
    means = np.stack([rows[group == number].mean(0) for number in range(len(classes))])  # (C, E)
    centred = rows - means[group]
    covariance = centred.T @ centred / (len(rows) - 1)  # (E, E), the centred rows have no mean
    size = rows.shape[1]
    precision = size * np.linalg.pinv(
        (len(rows) - 1) * covariance + np.trace(covariance) * np.eye(size), hermitian=True
    )
    weights = means @ precision
    return Discriminant(classes, weights, -np.log(len(classes)) - (weights * means).sum(1) / 2)


def with_descriptions(classifier: Discriminant, vectors: ArrayLike, described: ArrayLike, alpha: float) -> Floats:
    """(N, C) zero-shot logits plus `alpha` times those of the classifier.

    Args:
        vectors: (N, E) of unit length. described: (C, E) vectors of the classes' descriptions, in their order.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    zero_shot = SCALE * rows @ np.asarray(described, dtype=np.float64).T
    combined: Floats = zero_shot + alpha * classifier.logits(rows)
    return combined


def few(labels: ArrayLike, shots: int, seed: int = 0) -> NDArray[np.int64]:
    """Places of `shots` examples of each class, drawn by a seed; fewer of a class that has fewer."""
    known, generator = np.asarray(labels), np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(known == label))[:shots] for label in np.unique(known)]
    return np.concatenate(drawn)
