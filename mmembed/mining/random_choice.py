"""Any of the candidates, with equal chances.

    P(chosen first = c) = 1 / |kept|, without replacement

The candidates are hard already; a random choice among them is less exposed to false negatives than the best are
(NV-Retriever, arXiv 2407.15831, samples from the top as well). What is drawn for a query depends on the seed and the
query's key alone.

When: behind a filter and a `rank_window`, for varied negatives from epoch to epoch (another seed).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner, uniform


class RandomChoice(Miner):
    """Any of the candidates, with equal chances."""

    name = "random"
    role = "pick"

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        return uniform(seed, candidates.keys, candidates.rows)
