"""Positives of other queries, of the queries that resemble this one least (SaHa's sampling, for each query by itself).

    owned(q)  = of the candidates of q that are positives of other queries, the best `pool`, in rank order

    chosen(q) = the first of owned(q) by ascending s(q, o(c)),   o(c) = argmax_o s(q, o) of the queries with positive c

Ju and Lee (arXiv 2508.00955): a positive whose query looks like this one may answer this one, too, so it comes last.
Where positives are class labels, the order of retrieval is kept. In `saha` a pair stands in one cluster, and its batch
holds the whole of it; here every query chooses for itself, so records get negatives as from any other rule, and a
document may be chosen by many. A document that is nobody's positive is never chosen.

When: the corpus is mostly positives, and a query's own batch cannot be arranged. Where it can, take `saha`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner, Rows
from mmembed.registry import Positive
from mmembed.search import Similarity, pair_scores
from mmembed.search.vectors import Vectors


class OwnerSimilarity(Miner):
    """Positives of other queries, of the least similar queries first.

    Args:
        pool: candidates with an owner that are looked at, K m by the paper.
        labels: whether the positives are class labels, which keep the order of retrieval.
    """

    name = "owner_similarity"
    role = "pick"
    reads = frozenset({"owners"})

    def __init__(self, pool: Positive = 45, labels: bool = False) -> None:
        self.pool, self.labels = pool, labels

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        assert candidates.owners is not None, "owner_similarity reads owners"
        owned = kept & (candidates.owners > -np.inf)
        looked_at = owned & (np.cumsum(owned, axis=1) <= self.pool)
        order = np.zeros(owned.shape) if self.labels else -candidates.owners.astype(np.float64)
        return np.where(looked_at, order, -np.inf)


def with_owners(
    candidates: Candidates,
    queries: Vectors,
    every_query: Vectors,
    positives: Rows,
    first: int = 0,
    similarity: Similarity = "cosine",
) -> Candidates:
    """The candidates with `owners`: how similar their most similar owner is to the query.

    Args:
        candidates: of Q queries.
        queries: (Q, E) their vectors. every_query: (M, E) those of all queries.
        positives: (M, P) rows of the corpus that each of all queries owns, -1 where it has fewer.
        first: the place of the Q queries among all of them.
        similarity: of two queries.
    """
    owner, column = np.nonzero(positives >= 0)
    numbers = first + np.arange(len(candidates.rows))
    return with_owning(candidates, queries, every_query, owner, positives[owner, column], numbers, similarity)


def with_owning(
    candidates: Candidates,
    queries: Vectors,
    every_query: Vectors,
    owner: Rows,
    owned: Rows,
    numbers: Rows,
    similarity: Similarity = "cosine",
) -> Candidates:
    """`with_owners` of a list instead of a table, which thousands of positives of one query would widen for all.

    Args:
        owner, owned: (K,) a query of all, and a row of the corpus that it owns.
        numbers: (Q,) which of all queries the Q ones are.
    """
    by_row = np.argsort(owned, kind="stable")
    starts = np.searchsorted(owned[by_row], np.arange(candidates.corpus + 1))
    rows, owner = candidates.rows, owner[by_row]
    many = np.where(candidates.valid, np.diff(starts)[rows], 0)  # (Q, C) owners of each candidate
    here = numbers[:, None]
    found = np.full(rows.shape, -np.inf, np.float32)
    for nth in range(int(many.max(initial=0))):
        table = np.full(rows.shape, -1, np.int64)  # the nth owner of each candidate
        table[many > nth] = owner[starts[rows[many > nth]] + nth]
        table[table == here] = -1
        found = np.fmax(found, pair_scores(queries, every_query, table, similarity=similarity))
    return replace(candidates, owners=found)
