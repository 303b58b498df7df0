"""Candidates that score some percent less than the positive.

    kept = { c : s(q, c) <= s+ - |s+| percent / 100 },  s+ = min over p of s(q, p)

TopK-PercPos of NV-Retriever (arXiv 2407.15831), with 95 % of the positive's score, also used by NV-Embed v2 (arXiv
2405.17428). The plain product s+ (1 - percent / 100) would lie above a negative s+; |s+| keeps it below, as in
sentence-transformers. With several positives the lowest counts.

When: the default guard against false negatives. It assumes scores that spread: where all cosines lie between .9 and
1, 5 percent removes nearly everything."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmembed.mining import Candidates, Mask, Miner


class PercentOfPositive(Miner):
    """Candidates that score some percent less than the positive.

    Args:
        percent: 5 by NV-Retriever; 0 to 100.
    """

    name = "percent_of_positive"
    role = "filter"
    reads = frozenset({"positive_scores"})

    def __init__(self, percent: Annotated[float, Field(ge=0, le=100)] = 5.0) -> None:
        self.percent = percent

    def keep(self, candidates: Candidates) -> Mask:
        return candidates.scores <= self.ceiling(candidates)

    def ceiling(self, candidates: Candidates) -> NDArray[np.float64]:
        positive = candidates.least_positive(self.name)  # (Q, 1)
        return positive - np.abs(positive) * (self.percent / 100)
