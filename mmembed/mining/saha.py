"""Self-aware hard negative sampling (SaHa): clusters of pairs whose positives are each other's hard negatives.

    owners(q) = of the best 2 K m positives of other queries, in rank order, one unused query each, until K m

    cluster(q) = the K owners o with the lowest s(q, o)

Ju and Lee (arXiv 2508.00955; read in the released code). A negative is another query's positive, reached through its
owner. An owner that resembles q has a positive that answers q, too: a false negative, and owners by ascending
similarity to q leave it out. Where queries carry class labels, owners keep the order of retrieval. A cluster is
trained as 1 + K pairs with in-batch negatives: no passes for negatives. Queries are taken in order; q and its owners
are used up, so a pair stands in one cluster. A second phase goes through the queries that are left, with twice as
many owners at most, used ones of the first phase included. Run once, with the zero-shot model and the prompt of
training.

When: records with one positive a query and no negatives, such as MMEB; batches must keep clusters whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.mining import Candidates, Miner
from mmembed.registry import Positive


class Cluster(NamedTuple):
    """1 + K pairs.

    query: whose cluster it is.
    owners: (K,) queries; fewer where there were not enough.
    rows: (K,) the positives that they were reached through, negatives of `query`.
    """

    query: int
    owners: NDArray[np.int64]
    rows: NDArray[np.int64]


class SelfAware(Miner):
    """Clusters of pairs whose positives are each other's hard negatives.

    Args:
        negatives: K, owners a cluster; 15 by the paper.
        multiple: m, how many times as many are looked at; 3 by the paper.
        labels: whether the positives are class labels.
    """

    name = "saha"
    role = "cluster"

    def __init__(self, negatives: Positive = 15, multiple: Positive = 3, labels: bool = False) -> None:
        self.negatives, self.multiple, self.labels = negatives, multiple, labels

    @property
    def depth(self) -> int:
        """2 K m."""
        return 2 * self.negatives * self.multiple

    def groups(
        self, candidates: Candidates, queries: NDArray[np.float32], apart: NDArray[np.int64], seed: int
    ) -> NDArray[np.int64]:
        """The clusters as numbers of groups. A query that the second phase takes again stays where it was, one that
        shares its number of `apart` with another one of its cluster stands alone. Nothing is drawn."""
        numbers = np.full(len(queries), -1, np.int64)
        for number, cluster in enumerate(self.clusters(candidates, queries)):
            held: set[int] = set()
            for query in (cluster.query, *cluster.owners.tolist()):
                if numbers[query] < 0 and int(apart[query]) not in held:
                    numbers[query] = number
                    held.add(int(apart[query]))
        return numbers

    def clusters(self, candidates: Candidates, queries: NDArray[np.float32]) -> list[Cluster]:
        """The clusters, in the order in which they are made: phase 1, then phase 2.

        Args:
            candidates: of `depth` rows of a corpus of positives.
            queries: (Q, E) vectors whose dot product is the similarity of two queries, of unit length.

        Raises:
            MmembedError: another number of queries, or a vector that is not finite.
        """
        if queries.ndim != 2 or len(queries) != len(candidates.rows):
            raise MmembedError(f"saha: vectors of shape {queries.shape} for {len(candidates.rows)} queries")
        if not np.isfinite(queries).all():
            query = int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])
            raise MmembedError(f"saha: the vector of query {query} holds NaN or infinity; encode it again")
        owners: dict[int, list[int]] = {}
        for query, column in np.argwhere(candidates.positives >= 0).tolist():
            owners.setdefault(int(candidates.positives[query, column]), []).append(query)
        used = np.zeros(len(queries), bool)
        made: list[Cluster] = []
        self._phase(candidates, queries, owners, used, used, self.negatives * self.multiple, made)
        if used.any() and not used.all():
            again = np.zeros(len(queries), bool)  # owners of the second phase
            self._phase(candidates, queries, owners, used, again, 2 * self.negatives * self.multiple, made)
        return made

    def _phase(
        self,
        candidates: Candidates,
        queries: NDArray[np.float32],
        owners: dict[int, list[int]],
        used: NDArray[np.bool_],
        taken: NDArray[np.bool_],
        most: int,
        made: list[Cluster],
    ) -> None:
        """One walk through the queries that are not `used`; owners that are `taken` are passed over."""
        for query in range(len(queries)):
            if used[query]:
                continue
            found: dict[int, int] = {}  # owner -> the row it was reached through
            for row in candidates.rows[query][: self.depth].tolist():
                if row < 0 or len(found) == most:
                    break
                free = [one for one in owners.get(row, []) if one != query and not taken[one] and one not in found]
                if free:
                    found[self._most_similar(queries, query, free)] = row
            if not found:
                continue
            chosen = np.array(list(found), np.int64)
            if not self.labels:
                chosen = chosen[np.argsort(_similarities(queries, query, chosen), kind="stable")]
            chosen = chosen[: self.negatives]
            made.append(Cluster(query, chosen, np.array([found[int(one)] for one in chosen], np.int64)))
            used[query] = True
            used[chosen] = True
            taken[chosen] = True

    @staticmethod
    def _most_similar(queries: NDArray[np.float32], query: int, free: list[int]) -> int:
        if len(free) == 1:
            return free[0]
        return free[int(np.argmax(_similarities(queries, query, np.array(free))))]


def _similarities(queries: NDArray[np.float32], query: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) of one query with others, summed in float64 in one order."""
    return np.einsum("ij,j->i", queries[others], queries[query], dtype=np.float64)
