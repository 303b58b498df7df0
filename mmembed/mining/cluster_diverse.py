"""Candidates of different clusters first.

    chosen = the best of each cluster by falling score, then the second of each, ...,  at most `most` of one cluster

Ten near-copies of one passage teach what one of them teaches. Clusters are any numbers of the corpus's rows: k-means
(`mmembed.clustering`), sources, classes.

When: the corpus holds many versions of one thing: forum answers, product pictures, translations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner
from mmembed.registry import Positive


class ClusterDiverse(Miner):
    """Candidates of different clusters first.

    Args:
        most: candidates of one cluster; None: any number, when nothing else is left.
    """

    name = "cluster_diverse"
    role = "pick"
    reads = frozenset({"clusters"})

    def __init__(self, most: Positive | None = None) -> None:
        self.most = most

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        assert candidates.clusters is not None, "cluster_diverse reads clusters"
        preference = np.full(kept.shape, -np.inf)
        query, place = np.nonzero(kept)  # by query, then rank
        cluster = candidates.clusters[candidates.rows[query, place]]
        order = np.lexsort((place, cluster, query))
        starts = np.ones(len(order), bool)  # of a cluster within a query
        starts[1:] = (query[order][1:] != query[order][:-1]) | (cluster[order][1:] != cluster[order][:-1])
        first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        turn = np.empty(len(order), np.int64)
        turn[order] = np.arange(len(order)) - first  # how many of the cluster are better
        preference[query, place] = np.where(turn < (self.most or len(order)), -turn.astype(np.float64), -np.inf)
        return preference
