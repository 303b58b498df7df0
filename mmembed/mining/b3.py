"""Groups of pairs that are near to each other, but not nearest: communities of a graph of ranks (B3).

    linked(i) = { j : skip <= rank of j's positive among the candidates of i < skip + neighbours }

    next(group) = the pair with the most links into it, until the group has `size`; it begins at a random one

Breaking the Batch Barrier (Thirukovalluru et al., arXiv 2505.11293; from memory) has a trained embedder rank all
positives for each query, leaves out the first p, where false negatives are, links a query with the next m, cuts the
graph into communities of K, and makes batches of |B| / K communities. There METIS cuts the graph; here groups are grown
one after the other, of equally linked pairs the better ranked first, and what is left at the end is in smaller groups.
A group holds no two queries that share a content.

When: in-batch negatives have become easy, an embedder that ranks well is at hand, and batches are larger than a group.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Miner, Owners, Rows
from mmembed.registry import Count, Positive


class B3(Miner):
    """Groups of pairs that are near to each other, but not nearest.

    Args:
        size: K, pairs a group; give a divisor of a batch of all processes.
        skip: p, best candidates of a query that are left out.
        neighbours: m, candidates behind them that are linked with it.
    """

    name = "b3"
    role = "cluster"

    def __init__(self, size: Positive = 32, skip: Count = 30, neighbours: Positive = 100) -> None:
        self.size, self.skip, self.neighbours = size, skip, neighbours

    @property
    def depth(self) -> int:
        return self.skip + self.neighbours

    def groups(self, candidates: Candidates, queries: NDArray[np.float32], apart: NDArray[np.int64], seed: int) -> Rows:
        order = np.random.default_rng(seed).permutation(len(queries))
        owners, numbers = Owners(candidates, order), np.full(len(queries), -1, np.int64)
        window = candidates.rows[:, self.skip : self.depth]  # (Q, m)
        linking: dict[int, list[int]] = defaultdict(list)  # positive -> queries that it is linked with
        for query, column in np.argwhere(window >= 0).tolist():
            linking[int(window[query, column])].append(query)
        number = 0
        for start in order.tolist():
            if owners.taken[start]:
                continue
            edges: dict[int, int] = defaultdict(int)  # positive -> edges into the group
            heap: list[tuple[int, int, int]] = []
            query, held, turns = start, set[int](), itertools.count()
            for _ in range(self.size):
                owners.take(query)
                numbers[query] = number
                held.add(int(apart[query]))
                near = [row for row in window[query].tolist() if row >= 0]
                of = owners.positive[query]
                near += [owners.positive[one] for one in linking[of] if not owners.taken[one]] if of >= 0 else []
                for row in near:
                    edges[row] += 1
                    heapq.heappush(heap, (-edges[row], next(turns), row))
                query = self._next(heap, edges, owners, apart, held)
                if query < 0:
                    break
            number += 1
        return numbers

    @staticmethod
    def _next(
        heap: list[tuple[int, int, int]],
        edges: dict[int, int],
        owners: Owners,
        apart: NDArray[np.int64],
        held: set[int],
    ) -> int:
        """The query with the most edges into the group; -1 where none is linked with it."""
        while heap:
            count, _, row = heapq.heappop(heap)
            if -count < edges[row]:  # pushed again with more
                continue
            found = owners.free(row, apart, held)
            if found >= 0:
                return found
        return -1
