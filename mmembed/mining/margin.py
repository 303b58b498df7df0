"""Candidates at least a margin below the positive.

    kept = { c : s(q, c) <= min over p of s(q, p) - margin }

TopK-MarginPos of NV-Retriever (arXiv 2407.15831). With several positives the lowest counts.

When: the scale of the scores is known and alike for all queries; otherwise `percent_of_positive`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner
from mmembed.registry import Weight


class Margin(Miner):
    """Candidates at least a margin below the positive.

    Args:
        margin: in the units of the scores.
    """

    name = "margin"
    role = "filter"
    reads = frozenset({"positive_scores"})

    def __init__(self, margin: Weight = 0.05) -> None:
        self.margin = margin

    def keep(self, candidates: Candidates) -> Mask:
        return candidates.scores <= self.ceiling(candidates)

    def ceiling(self, candidates: Candidates) -> NDArray[np.float64]:
        return candidates.least_positive(self.name) - self.margin
