"""Whether a similarity means the same for every query: one ROC curve of all, and similarities as probabilities.

The curve is of the pool of the Mann-Whitney loss's paper (`mmembed.metrics.pool`): every positive, and the best others
of every query. Probabilities are of the first documents of every query. Area and calibration themselves are in
`mmembed.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmembed.errors import MmembedError

Floats = NDArray[np.float64]


def roc(found: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Floats]:
    """The ROC curve of scores of positives (P,) and of others (N,): false and true positive rate at each threshold.

    From (0, 0) to (1, 1), one point a distinct score: equal scores are one step. The area below is `pooled_auc`.

    Raises:
        MmembedError: one of the two is empty.
    """
    positives, others = np.asarray(found, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    if not len(positives) or not len(others):
        raise MmembedError("roc: give a score of a positive and one of another")
    scores = np.concatenate([positives, others])
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each distinct score
    hits = np.concatenate([np.ones(len(positives)), np.zeros(len(others))])[order]
    true, false = hits.cumsum()[last], (1 - hits).cumsum()[last]
    return np.append(0.0, false / len(others)), np.append(0.0, true / len(positives))


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points of a curve, evenly by their number, the ends among them: for drawing."""
    if len(points) <= most:
        return list(points)
    return [points[place] for place in np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))]


def as_probabilities(similarity: ArrayLike) -> Floats:
    """Cosines as they are often taken for probabilities: (1 + s) / 2, cut to [0, 1]."""
    values: Floats = np.clip((1 + np.asarray(similarity, dtype=np.float64)) / 2, 0, 1)
    return values


def first(similarity: ArrayLike, relevance: ArrayLike, k: int) -> tuple[Floats, NDArray[np.bool_]]:
    """(Q k,) similarities of the k best documents of each query, and whether each is relevant: what a user is shown.

    Args:
        similarity, relevance: (Q, D); all D where k is larger.
    """
    values, labels = np.asarray(similarity, dtype=np.float64), np.asarray(relevance, dtype=np.float64) > 0
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, best, axis=1).ravel(), np.take_along_axis(labels, best, axis=1).ravel()


def scaled(similarity: ArrayLike, relevance: ArrayLike, k: int, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """Probabilities of relevance by Platt's scaling, each from queries that it has not learned from.

    p = 1 / (1 + exp(-(a s + b))), a and b by maximum likelihood (Platt 1999, without his smoothing of the targets) on
    one half of the queries, for the pairs of the other half, and back.

    Args:
        similarity, relevance: (Q, D), Q at least 2. k: documents a query, the `first`.

    Returns:
        (N,) probabilities of the pairs, and whether each is relevant.

    Raises:
        MmembedError: a half shows no relevant document, or nothing else.
    """
    from sklearn.linear_model import LogisticRegression

    values, labels = np.asarray(similarity, dtype=np.float64), np.asarray(relevance, dtype=np.float64)
    order = np.random.default_rng(seed).permutation(len(values))
    sides = [first(values[half], labels[half], k) for half in (order[: len(order) // 2], order[len(order) // 2 :])]
    if any(known.all() or not known.any() for _, known in sides):
        raise MmembedError(
            f"half of the queries show nothing relevant, or nothing else, among their first {k} documents"
        )
    given = []
    for (learned, known), (asked, _) in (sides, sides[::-1]):
        model = LogisticRegression(C=np.inf, max_iter=1000).fit(learned[:, None], known)
        given.append(model.predict_proba(asked[:, None])[:, 1])
    return np.concatenate(given), np.concatenate([sides[1][1], sides[0][1]])
