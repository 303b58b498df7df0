"""Stored vectors as search reads them, and the one definition of a score.

A score is the dot product of two decoded rows (of unit length for "cosine"), summed in float64 by numpy's einsum, in an
order that depends on the dimensions alone, then rounded to float32. It costs .2 us a pair of 256 dimensions on a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmembed.errors import MmembedError, nearest
from mmembed.quantize import decode, to_array, unit_rows
from mmembed.search.tables import StoredTables

Similarity = Literal["cosine", "dot"]
Vectors = NDArray[Any] | Tensor | StoredTables | str | Path
PAIRS = 4096  # pairs that are scored at a time: 8 MB at 256 dimensions


class Hits(NamedTuple):
    """The best k of each query, best first. Where there are fewer than k rows to find, -1 and -inf fill up."""

    scores: NDArray[np.float32]  # (Q, k)
    indices: NDArray[np.int64]  # (Q, k) rows of the corpus


class Rows:
    """Stored vectors, (N, W) in any precision of `mmembed.quantize`, read as float32 rows whose dot is the similarity.

    Args:
        vectors: an array, memory map or tensor, or a path as `open_vectors` takes it.
        name: what they are, for the messages.
        dim: of binary vectors, the dimensions before packing (needed only where it is no multiple of 8).

    Raises:
        MmembedError: no readable file, not two axes, an unknown similarity.
    """

    def __init__(self, vectors: Vectors, similarity: Similarity, name: str, dim: int | None = None) -> None:
        if similarity not in ("cosine", "dot"):
            raise MmembedError(f"similarity: there is no '{similarity}'; {nearest(similarity, ['cosine', 'dot'])}")
        if isinstance(vectors, str | Path):
            vectors = open_vectors(vectors)
        self.stored = vectors if isinstance(vectors, StoredTables) else to_array(vectors)
        if self.stored.ndim != 2:
            raise MmembedError(f"{name}: an array of shape {self.stored.shape}; search needs two axes")
        self.similarity, self.name, self.dim = similarity, name, dim

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def size(self) -> int:
        """E, the dimensions."""
        return int(decode(self.stored[:0], self.dim).shape[1])

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop -> (n, E). Raises MmembedError where one holds NaN or infinity."""
        return self._prepare(self.stored[start:stop], range(start, stop))

    def take(self, index: NDArray[np.int64], *, checked: bool = False) -> NDArray[np.float32]:
        """The rows at `index` (n,) -> (n, E). Raises, where it is `checked`, as `read`."""
        return self._prepare(self.stored[index], index if checked else None)

    def _prepare(self, stored: NDArray[Any], rows: Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.float32]:
        vectors = decode(stored, self.dim)
        if self.similarity == "cosine" and stored.dtype.kind != "i" and stored.dtype != np.uint8:
            with np.errstate(invalid="ignore", over="ignore"):  # refused below
                vectors = unit_rows(np.ascontiguousarray(vectors))  # sums of a row do not depend on the array's layout
        if rows is not None and not np.isfinite(vectors).all():
            row = rows[int(np.flatnonzero(~np.isfinite(vectors).all(axis=-1))[0])]
            raise MmembedError(
                f"search: row {row} of the {self.name} holds NaN or infinity; encode it again in float32"
            )
        return np.ascontiguousarray(vectors)


def open_vectors(path: str | Path) -> NDArray[Any] | StoredTables:
    """Stored vectors (N, W), which stay on the disk.

    Args:
        path: a folder of `mmembed encode`, a .npy file, which is mapped, or a folder of tables (`tables.py`).

    Raises:
        MmembedError: it is missing or no such array.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "vectors.npy").is_file():
            return open_vectors(path / "vectors.npy")
        tables = path / "vectors"
        return StoredTables(tables if tables.is_dir() else path)
    try:
        vectors: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise MmembedError(f"{path}: no readable .npy file ({error}); write one with `mmembed encode`") from error
    if vectors.ndim != 2:
        raise MmembedError(f"{path}: an array of shape {vectors.shape}; search needs two axes, (vectors, dimensions)")
    return vectors


def check_sizes(queries: int, corpus: int) -> None:
    """Raises MmembedError unless both have these dimensions in common."""
    if queries != corpus:
        raise MmembedError(
            f"search: queries have {queries} dimensions, the corpus {corpus}; "
            "encode both with one model and one truncate_dim"
        )


def pair_scores(
    queries: Vectors,
    corpus: Vectors,
    rows: NDArray[np.int64],
    *,
    similarity: Similarity = "cosine",
    dim: int | None = None,
) -> NDArray[np.float32]:
    """Similarities of each query with its own rows of the corpus.

    Args:
        queries, corpus, similarity, dim: as `top_k` takes them.
        rows: (Q, P) rows of the corpus; -1 where a query has fewer.

    Returns:
        (Q, P) float32; NaN where there is no row. Equal to the score that `top_k` gives the pair, bit by bit.

    Raises:
        MmembedError: as `top_k`; a row that the corpus does not have.
    """
    left, right = Rows(queries, similarity, "queries", dim), Rows(corpus, similarity, "corpus", dim)
    check_sizes(left.size, right.size)
    rows = np.asarray(rows)
    if rows.ndim != 2 or len(rows) != len(left):
        raise MmembedError(f"pair_scores: rows of shape {rows.shape} for {len(left)} queries; give (Q, P)")
    if rows.size and not -1 <= rows.min() <= rows.max() < len(right):
        raise MmembedError(f"pair_scores: rows {rows.min()} to {rows.max()} of a corpus of {len(right)}")
    scores = np.full(rows.shape, np.nan, np.float32)
    of, column = np.nonzero(rows >= 0)
    for start in range(0, len(of), PAIRS):
        part = slice(start, start + PAIRS)
        unique, place = np.unique(of[part], return_inverse=True)
        found = score(left.take(unique)[place], right.take(rows[of[part], column[part]]))
        if not np.isfinite(found).all():
            row = int(of[part][~np.isfinite(found)][0])
            raise MmembedError(f"pair_scores: query {row} or one of its rows holds NaN or infinity; encode it again")
        scores[of[part], column[part]] = found
    return scores


def score(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, E), (n, E) -> (n,) the scores of the pairs."""
    return np.einsum("ij,ij->i", left, right, dtype=np.float64, casting="safe").astype(np.float32)
