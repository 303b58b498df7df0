"""Groups of pairs along a path from each query to the nearest positive that is left: hard in-batch negatives.

    next(i) = owner of the best positive of candidates(i) that no group holds yet

In-context pretraining (Shi et al., arXiv 2310.10638) sorts a corpus so: a path that goes from document to nearest
document and visits each once, so that neighbours in the order are alike. Here a step goes from a query to the positive
of another one, since these two become each other's negatives; the path is cut into groups that stay together in a
batch. It begins, and goes on where no candidate is left, at a query drawn at random (there: the one with the fewest
neighbours). A group holds no two queries that share a content: they would be false negatives of each other.

When: batches are small and random in-batch negatives are easy; `b3` leaves out the nearest ones, where false negatives
are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Miner, Owners, Rows
from mmembed.registry import Positive


class Similar(Miner):
    """Groups of pairs along a path of nearest neighbours.

    Args:
        size: pairs a group; give a divisor of a batch of all processes, or that batch.
        neighbours: candidates a query among which the next is looked for.
    """

    name = "similar"
    role = "cluster"

    def __init__(self, size: Positive = 32, neighbours: Positive = 50) -> None:
        self.size, self.neighbours = size, neighbours

    @property
    def depth(self) -> int:
        return self.neighbours

    def groups(self, candidates: Candidates, queries: NDArray[np.float32], apart: NDArray[np.int64], seed: int) -> Rows:
        order = np.random.default_rng(seed).permutation(len(queries))
        owners, numbers = Owners(candidates, order), np.full(len(queries), -1, np.int64)
        starts, query, number, held = iter(order.tolist()), -1, -1, set[int]()
        for _ in range(len(queries)):
            if number < 0 or len(held) == self.size:
                number, held = number + 1, set()
            near = [] if query < 0 else candidates.rows[query, : self.neighbours].tolist()
            query = next((one for one in (owners.free(row, apart, held) for row in near) if one >= 0), -1)
            if query < 0:
                query = next(one for one in starts if not owners.taken[one])
                if int(apart[query]) in held:
                    number, held = number + 1, set()
            owners.take(query)
            numbers[query] = number
            held.add(int(apart[query]))
        return numbers
