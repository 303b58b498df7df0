"""Random rows of the corpus where too few candidates are left.

    P(c) = 1 / N for any row c that is no known positive, not barred, no candidate, and no copy of one of them

Candidates that filters removed are suspected positives, so none of them comes back, and no row that the same filters
would remove: beside `margin`, `percent_of_positive` and `threshold` with `most` a query is filled only where its last
candidate passes them, since what the search did not find scores at most as much. Elsewhere, where the positive ranks
below `depth`, it has fewer negatives; a greater depth fills more. This holds for exact search: an approximate index
may miss rows that score higher, and a teacher has not scored any of them (`mmembed.mining.fillable`). Rows are drawn
until one is allowed; from a corpus in which hardly any is, in the order of a random permutation.

When: records need as many negatives as can be had.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmembed.mining import Candidates, Mask, Miner, Rows, uniform

DRAWS = 64  # before all rows of the corpus are tried


class RandomFill(Miner):
    """Random rows of the corpus where too few candidates are left."""

    name = "random_fill"
    role = "fill"

    def fill(self, candidates: Candidates, chosen: Rows, open_to: Mask, seed: int) -> Rows:
        filled = chosen.copy()
        for query in np.flatnonzero((chosen < 0).any(axis=1) & open_to):
            places = np.flatnonzero(chosen[query] < 0)
            rows = [candidates.rows[query], candidates.positives[query]]
            rows += [] if candidates.barred is None else [candidates.barred[query]]
            found = np.concatenate(rows)
            known = set(candidates.content(found[found >= 0]).tolist())
            key, numbers = candidates.keys[query : query + 1], np.arange(DRAWS + len(places))[None]
            order = (uniform(seed + 1, key, numbers)[0] * candidates.corpus).astype(np.int64)
            drawn = _allowed(candidates, order, known, len(places))
            if len(drawn) < len(places):
                order = np.argsort(uniform(seed + 2, key, np.arange(candidates.corpus)[None])[0])
                drawn += _allowed(candidates, order, known, len(places) - len(drawn))
            filled[query, places[: len(drawn)]] = drawn
        return filled


def _allowed(candidates: Candidates, order: NDArray[np.int64], known: set[int], count: int) -> list[int]:
    """The first `count` rows of `order` of a content that is not known; theirs becomes known."""
    drawn: list[int] = []
    for row, content in zip(order.tolist(), candidates.content(order).tolist(), strict=True):
        if len(drawn) == count:
            break
        if content not in known:
            drawn.append(row)
            known.add(content)
    return drawn
