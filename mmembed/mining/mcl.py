"""Negatives that share what earlier stages have learned (MCL).

    kept = { c : y(c) = y(p) for a positive p },  y = y_0 K^(S-1) + ... + y_(S-1),  y_s = cluster after stage s

Zhang et al. (arXiv 2402.11816) train in stages. After each the features of the data are clustered (`next_stage`); the
next stage compares within one composite cluster only (`composite`), where what was learned so far tells nothing
apart, so the model has to find something new. The final vector joins those of all stages. There batches are drawn
from a cluster; here each query's negatives are. The released script reads the last clustering in place of every
earlier one; here all count.

When: a second and later round of mining, where negatives of one look (colour, layout, topic) have become easy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmembed.clustering import kmeans, nearest
from mmembed.errors import MmembedError
from mmembed.mining import Candidates, Mask, Miner
from mmembed.quantize import unit_rows

CLUSTERS = 10  # of a stage, by the paper
SAMPLE = 65536  # rows that centres are computed from
BLOCK = 65536  # rows that are assigned at a time


class Mcl(Miner):
    """Candidates in the composite cluster of a positive. The clusters are the candidates' `clusters`."""

    name = "mcl"
    role = "filter"
    reads = frozenset({"clusters"})

    def keep(self, candidates: Candidates) -> Mask:
        assert candidates.clusters is not None, "mcl reads clusters"
        own = np.where(candidates.positives >= 0, candidates.clusters[candidates.positives], -1)  # (Q, P)
        there = candidates.positives >= 0
        found = candidates.clusters[candidates.rows]  # (Q, C)
        kept = np.zeros(candidates.rows.shape, bool)
        for column in range(own.shape[1]):
            kept |= (found == own[:, column, None]) & there[:, column, None]
        return kept & candidates.valid


def composite(stages: Sequence[NDArray[np.int64]], count: int = CLUSTERS) -> NDArray[np.int64]:
    """Clusters (N,) of each stage, numbers below `count`, -> one number a row (N,), equal where all stages agree.

    >>> composite([np.array([2, 7]), np.array([3, 1])]).tolist()
    [23, 71]

    Raises MmembedError for a cluster that is not below `count`, and more stages than int64 can number.
    """
    if int(count) ** len(stages) > 2**63:
        raise MmembedError(f"mcl: numbers of {len(stages)} stages of {count} clusters exceed 64 bits; join fewer")
    joined = np.zeros_like(stages[0])
    for stage in stages:
        if stage.size and not 0 <= stage.min() <= stage.max() < count:
            raise MmembedError(f"mcl: clusters {stage.min()} to {stage.max()}; they should be below {count}")
        joined = joined * count + stage
    return joined


def next_stage(vectors: NDArray[np.float32], seed: int, count: int = CLUSTERS) -> NDArray[np.int64]:
    """(N, E) vectors of the stage that was just trained -> (N,) numbers of their clusters, by k-means of directions.

    Raises MmembedError for fewer vectors than clusters, or one that is not finite.
    """
    if len(vectors) < count:
        raise MmembedError(f"mcl: {count} clusters of {len(vectors)} vectors; give fewer clusters")
    rows = np.linspace(0, len(vectors) - 1, min(len(vectors), SAMPLE), dtype=np.int64)
    sample = unit_rows(np.asarray(vectors[rows], np.float32))
    centres = kmeans(torch.from_numpy(sample), count, torch.Generator().manual_seed(seed))
    numbers = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = unit_rows(np.asarray(vectors[start : start + BLOCK], np.float32))
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise MmembedError(f"mcl: vector {row} holds NaN or infinity; encode it again")
        numbers[start : start + BLOCK] = nearest(torch.from_numpy(block), centres)[0].flatten().numpy()
    return numbers
