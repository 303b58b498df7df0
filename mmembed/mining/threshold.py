"""Candidates whose score lies between two numbers.

    kept = { c : least <= s(q, c) <= most }

TopK-Abs of NV-Retriever (arXiv 2407.15831): one bar for all queries, which is too high for some and too low for others.
`least` leaves out what is too easy; a fill may bring such rows.

When: a calibrated teacher (a reranker's probability), whose scores mean the same for all queries.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import ConfigError
from mmembed.mining import Candidates, Mask, Miner


class Threshold(Miner):
    """Candidates whose score lies between two numbers.

    Args:
        most: None: no upper end.
        least: None: no lower end.
    """

    name = "threshold"
    role = "filter"

    def __init__(self, most: float | None = None, least: float | None = None) -> None:
        self.most, self.least = math.inf if most is None else most, -math.inf if least is None else least
        if most is None and least is None:
            raise ConfigError("mining.threshold: has no effect without most or least; give one")
        if self.least > self.most:
            raise ConfigError(f"mining.threshold: least {least} is above most {most}; nothing would be left")

    def keep(self, candidates: Candidates) -> Mask:
        return (candidates.scores <= self.ceiling(candidates)) & (candidates.scores >= np.float64(self.least))

    def ceiling(self, candidates: Candidates) -> NDArray[np.float64]:
        return np.full((len(candidates.rows), 1), self.most)
