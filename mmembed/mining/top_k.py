"""The best-scored candidates.

    chosen = the first `count` by falling score, ties by the smaller row

The hardest negatives there are, and the likeliest to be unlabelled positives: take a filter with it. This is what
`mine` does without any pick.

When: with a filter that removes false negatives (`percent_of_positive`), or where all positives are known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner


class TopK(Miner):
    """The best-scored candidates."""

    name = "top_k"
    role = "pick"

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        return np.zeros(candidates.rows.shape)  # candidates are in this order
