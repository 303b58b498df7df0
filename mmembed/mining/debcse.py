"""Negatives that look like the query and mean something else, drawn with inverse propensities (DebCSE).

    P(chosen first = c) ~ w(c),  w(c) = surface(q, c) / max(meaning(q, c), floor),  without replacement

    meaning = (1 + cos) / 2

Miao et al., "DebCSE" (arXiv 2309.07396): pairs drawn by a simple rule are biased, by words and length for example, so
each is weighted by the inverse of how likely that rule is to draw it: negatives that share words with the query and
mean something else weigh most, and positives that share none and mean the same. Those are drawn of the candidates of
sentences without labels by `positive_weights`, a function for scripts (docs/mining.md has one). The equations
are our reading of the abstract; no code is released. `shared_words` is a surface similarity; any in [0, 1] will do.

When: texts, similarity tasks, and embedders that go by shared words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.data.words import split_words
from mmembed.errors import MmembedError
from mmembed.mining import Candidates, Floats, Mask, Miner, uniform
from mmembed.registry import Above0


class DebCse(Miner):
    """Negatives that look like the query and mean something else. Scores must be cosines.

    Args:
        floor: no weight is above 1 / floor.
    """

    name = "debcse"
    role = "pick"
    reads = frozenset({"surface"})

    def __init__(self, floor: Above0 = 0.1) -> None:
        self.floor = floor

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        assert candidates.surface is not None, "debcse reads surface"
        weights = _ratio(candidates.surface, _meaning(candidates.scores, kept), self.floor)  # (Q, C)
        drawn = np.log(uniform(seed, candidates.keys, candidates.rows))  # Efraimidis and Spirakis: u ^ (1 / w)
        return drawn / np.maximum(weights, 1e-9)  # what shares nothing comes last


def positive_weights(candidates: Candidates, floor: float = 0.1) -> NDArray[np.float64]:
    """How much each candidate weighs as a positive: meaning / max(surface, floor).

    Args:
        candidates: with `surface`; their scores must be cosines.
        floor: no weight is above 1 / floor.

    Returns:
        (Q, C), 0 behind the last candidate.

    Raises:
        MmembedError: candidates without a surface, or scores that are no cosines.
    """
    if candidates.surface is None:
        raise MmembedError("mining.debcse: the candidates have no surface; give it to Candidates.of")
    weights = _ratio(_meaning(candidates.scores, candidates.valid), candidates.surface, floor)
    return np.where(candidates.valid, weights, 0.0)


def shared_words(left: str, right: str) -> float:
    """How many of the words of two texts are in both: Jaccard's index, case and order left out; 0 of two empty texts.

    >>> shared_words("A man plays a guitar", "a man eats")
    0.4
    """
    one, other = ({word.text.casefold() for word in split_words(text)} for text in (left, right))
    return len(one & other) / max(1, len(one | other))


def _meaning(scores: Floats, where: Mask) -> NDArray[np.float64]:
    """Cosines -> [0, 1]. Raises MmembedError for scores that are none."""
    cosines = np.where(where, scores, 0.0).astype(np.float64)
    if np.abs(cosines).max(initial=0.0) > 1 + 1e-3:
        raise MmembedError(f"mining.debcse: a score of {np.abs(cosines).max():.3g}; search by cosine")
    return (1 + cosines.clip(-1, 1)) / 2


def _ratio(wanted: NDArray[np.floating], propensity: NDArray[np.floating], floor: float) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = wanted.astype(np.float64) / np.maximum(propensity.astype(np.float64), floor)
    return ratio
