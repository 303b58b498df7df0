"""The search that mining begins with: the best rows of a corpus for each query, known positives left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.mining import Candidates, Rows
from mmembed.search import FaissIndex, Similarity, pair_scores, top_k
from mmembed.search.vectors import Rows as Stored
from mmembed.search.vectors import Vectors


def retrieve(
    queries: Vectors,
    corpus: Vectors,
    positives: Rows,
    depth: int,
    *,
    similarity: Similarity = "cosine",
    dim: int | None = None,
    keys: NDArray[np.uint64] | None = None,
    contents: NDArray[np.int64] | None = None,
    clusters: NDArray[np.int64] | None = None,
    barred: Rows | None = None,
    spare: bool = True,
    index: FaissIndex | None = None,
    **search: Any,
) -> Candidates:
    """The best candidates of each query.

    Args:
        queries, corpus, similarity, dim: as `mmembed.search.top_k` takes them.
        positives: (Q, P) rows of the known positives, -1 where a query has fewer.
        depth: candidates a query, at most.
        keys, contents, clusters, barred: as `Candidates.of` takes them.
        spare: search P rows deeper, and as many more as are barred, so that `depth` are left without these. Copies
            (`contents`) can still leave fewer.
        index: search in this one, which is over `corpus`; None: exact search.
        search: `device`, `products`, `corpus_rows`, `block_bytes`, `show_progress` of exact search.

    Returns:
        Candidates, with the scores of the positives.

    Raises:
        MmembedError: a corpus smaller than `depth` and the positives; vectors that do not fit or are not finite.
    """
    positives = np.asarray(positives, np.int64)
    if positives.ndim != 2:
        raise MmembedError(f"mining: positives of shape {positives.shape}; give (Q, P), -1 where a query has fewer")
    known = positives.shape[1] + (0 if barred is None else barred.shape[1])
    size, wanted = len(Stored(corpus, similarity, "corpus", dim)), depth + (known if spare else 0)
    if size < wanted:
        raise MmembedError(
            f"mining: {depth} candidates beside {wanted - depth} known positives of a corpus of {size}; ask for "
            f"{max(0, size - wanted + depth)} at most, or add documents"
        )
    positive_scores = pair_scores(queries, corpus, positives, similarity=similarity, dim=dim)
    if index is None:
        hits = top_k(queries, corpus, wanted, similarity=similarity, dim=dim, **search)
    elif search:
        raise MmembedError(f"mining: {', '.join(sorted(search))} are options of exact search; leave them out")
    else:
        hits = index.top_k(queries, wanted)
    found = Candidates.of(
        hits.indices, hits.scores, positives, size,
        keys=keys, positive_scores=positive_scores, contents=contents, clusters=clusters,
        barred=barred,
    )  # fmt: skip
    return found.first(depth)
