"""Candidates of some ranks only.

    kept = { c : first <= rank(c) < last },  rank 0 is the best candidate that is no known positive

TopK-Shifted of NV-Retriever (arXiv 2407.15831): the very best ranks hold most of the false negatives. Crude, because
the number of those differs between queries.

When: nothing is known of the positives' scores; or to cap how deep random picks reach (`last`).
"""

from __future__ import annotations

import numpy as np

from mmembed.errors import ConfigError
from mmembed.mining import Candidates, Mask, Miner
from mmembed.registry import Count, Positive


class RankWindow(Miner):
    """Candidates of some ranks only.

    Args:
        first: ranks that are skipped.
        last: the rank behind the last; None: no end.
    """

    name = "rank_window"
    role = "filter"

    def __init__(self, first: Count = 0, last: Positive | None = None) -> None:
        if last is not None and last <= first:
            raise ConfigError(f"mining.rank_window: last {last} is not behind first {first}; nothing would be left")
        self.first, self.last = first, last

    def keep(self, candidates: Candidates) -> Mask:
        ranks = np.arange(candidates.rows.shape[1])  # (C,)
        inside = (ranks >= self.first) & (ranks < (len(ranks) if self.last is None else self.last))
        return np.broadcast_to(inside, candidates.rows.shape)
