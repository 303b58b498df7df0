"""MaxSim (ColBERT, arXiv 2004.12832): inputs of many vectors, rescored over what a first search found.

    s(q, d) = sum over the vectors i of q of max over the vectors j of d of q_i d_j

Products are float64, a query at a time with its candidates in the order of their rows, so a score does not depend on
which other queries there are; it is rounded to float32. Cost: T_q T_d E multiply-adds a candidate, and its vectors read
once a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.search.vectors import Hits, Rows, Similarity, Vectors, check_sizes


class TokenVectors(NamedTuple):
    """The vectors of N inputs, one behind another, so that they can be mapped from one file.

    vectors: (sum of T, W), as `mmembed.search.top_k` takes a corpus.
    starts: (N + 1,) where those of each input begin; the last is where all end.
    """

    vectors: Vectors
    starts: NDArray[np.int64]

    @classmethod
    def joined(cls, inputs: Sequence[NDArray[Any]]) -> TokenVectors:
        """Of a list with one (T, W) array an input, as `Embedder.encode` gives it."""
        starts = np.cumsum([0, *map(len, inputs)], dtype=np.int64)
        return cls(np.concatenate(list(inputs)) if inputs else np.empty((0, 0), np.float32), starts)


def rescore_maxsim(
    queries: TokenVectors | Sequence[NDArray[Any]],
    documents: TokenVectors | Sequence[NDArray[Any]],
    candidates: NDArray[np.int64],
    k: int | None = None,
    *,
    similarity: Similarity = "cosine",
    dim: int | None = None,
) -> Hits:
    """The candidates of each query, ordered by MaxSim.

    Args:
        queries, documents: vectors of Q and N inputs.
        candidates: (Q, C) numbers of documents, for example of a `top_k` over mean vectors; -1 where a query has fewer.
        k: how many to keep; all where it is None.
        similarity, dim: of two vectors, as `top_k` takes them.

    Returns:
        Hits: scores (Q, k) falling, ties by the smaller document; -inf and -1 where a query has fewer candidates.

    Raises:
        MmembedError: a query or a document without vectors, a candidate that is no document, sizes that differ, a
            vector that is not finite.
    """
    left, right = (one if isinstance(one, TokenVectors) else TokenVectors.joined(one) for one in (queries, documents))
    asked, found = Rows(left.vectors, similarity, "queries", dim), Rows(right.vectors, similarity, "documents", dim)
    count = len(right.starts) - 1
    if candidates.ndim != 2 or len(candidates) != len(left.starts) - 1:
        raise MmembedError(f"maxsim: candidates of shape {candidates.shape} for {len(left.starts) - 1} queries")
    if candidates.size and not -1 <= candidates.min() <= candidates.max() < count:
        raise MmembedError(f"maxsim: candidates {candidates.min()} to {candidates.max()} of {count} documents")
    check_sizes(asked.size, found.size)
    k = candidates.shape[1] if k is None else min(k, candidates.shape[1])
    hits = Hits(np.full((len(candidates), k), -np.inf, np.float32), np.full((len(candidates), k), -1, np.int64))
    for query, row in enumerate(candidates):
        chosen = np.unique(row[row >= 0])  # rising
        if not len(chosen):
            continue
        own = _vectors(asked, left.starts, np.array([query]), "query")
        scores = _maxsim(own, _vectors(found, right.starts, chosen, "document"), right.starts, chosen)
        order = np.argsort(-scores, kind="stable")[:k]
        hits.scores[query, : len(order)], hits.indices[query, : len(order)] = scores[order], chosen[order]
    return hits


def _vectors(rows: Rows, starts: NDArray[np.int64], inputs: NDArray[np.int64], what: str) -> NDArray[np.float64]:
    """Those of the inputs, one behind another: (sum of T, E)."""
    lengths = starts[inputs + 1] - starts[inputs]
    if not lengths.min() > 0:
        raise MmembedError(f"maxsim: {what} {int(inputs[lengths <= 0][0])} has no vectors; leave it out")
    index = np.concatenate([np.arange(starts[one], starts[one + 1]) for one in inputs])
    vectors = rows.take(index).astype(np.float64)
    if not np.isfinite(vectors).all():
        place = int(index[~np.isfinite(vectors).all(axis=1)][0])
        raise MmembedError(f"maxsim: row {place} of the {rows.name} holds NaN or infinity; encode it again in float32")
    return vectors


def _maxsim(
    query: NDArray[np.float64], documents: NDArray[np.float64], starts: NDArray[np.int64], chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(T, E), (sum of T, E) -> (C,)."""
    lengths = starts[chosen + 1] - starts[chosen]
    best = np.maximum.reduceat(query @ documents.T, np.cumsum(lengths) - lengths, axis=1)  # (T, C)
    scores: NDArray[np.float32] = best.sum(axis=0).astype(np.float32)
    return scores
