"""Exact top-k search over vectors that need not fit in memory.

The corpus is read block after block (a memory-mapped .npy is never loaded whole). Each block is multiplied with blocks
of queries, and every query keeps its best k so far. After the first blocks almost nothing beats the k-th best, so a
comparison with that threshold replaces sorting: the cost is close to the matrix product alone.

    time    O(Q N E) multiply-adds, plus O(Q k log(N / k)) candidates that enter some running top-k
    memory  one block of scores (`block_bytes`) + one decoded corpus block + Q k results; independent of N

Ties are broken by the smaller index, whatever the block sizes are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmembed.errors import MmembedError, nearest
from mmembed.inference.quantize import decode, unit_rows

Similarity = Literal["cosine", "dot"]
BLOCK_BYTES = 32 << 20  # one block of float32 scores; 32 MB stays in the last cache level of current processors
CORPUS_ROWS = 8192  # rows read at a time: large enough for the product's peak rate, 8 MB at 256 dimensions


class Hits(NamedTuple):
    """The best k of each query, best first. Where the corpus has fewer than k rows, k is its size."""

    scores: NDArray[np.float32]  # (Q, k)
    indices: NDArray[np.int64]  # (Q, k) rows of the corpus


def open_vectors(path: str | Path) -> NDArray[Any]:
    """A .npy file as a memory-mapped (N, W) array. Raises MmembedError when it is missing or no such array."""
    try:
        vectors: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise MmembedError(f"{path}: no readable .npy file ({error}); write one with `mmembed encode`") from error
    if vectors.ndim != 2:
        raise MmembedError(f"{path}: an array of shape {vectors.shape}; search needs two axes, (vectors, dimensions)")
    return vectors


def top_k(
    queries: NDArray[Any] | Tensor,
    corpus: NDArray[Any] | Tensor | str | Path,
    k: int,
    *,
    similarity: Similarity = "cosine",
    dim: int | None = None,
    corpus_rows: int = CORPUS_ROWS,
    block_bytes: int = BLOCK_BYTES,
    device: str | torch.device = "cpu",
) -> Hits:
    """The k corpus rows most similar to each query, exactly.

    Args:
        queries: (Q, W) vectors in any precision of `mmembed.inference.quantize`.
        corpus: (N, W) vectors, an array, memory map or tensor, or the path of a .npy file. Queries may be float
            against an int8 or binary corpus.
        k: how many; at least 1.
        similarity: "cosine", or "dot" of the decoded vectors.
        dim: of binary vectors, the dimensions before packing (needed only where it is no multiple of 8).
        corpus_rows, block_bytes: block sizes; they bound the memory and never change which rows are found, beyond the
            last bit of a float32 score.
        device: where the products are computed.

    Returns:
        Hits: scores (Q, k) falling, ties by the smaller index.

    Raises:
        MmembedError: widths differ, no vectors, k < 1, or a vector that is not finite.
    """
    if similarity not in ("cosine", "dot"):
        raise MmembedError(f"similarity: there is no '{similarity}'; {nearest(similarity, ['cosine', 'dot'])}")
    if k < 1:
        raise MmembedError(f"top_k: k is {k}; give at least 1")
    rows = open_vectors(corpus) if isinstance(corpus, str | Path) else _array(corpus)
    left = _prepare(_array(queries), similarity, dim, "queries").to(device)  # (Q, E)
    if rows.ndim != 2 or left.ndim != 2:
        raise MmembedError(f"top_k: shapes {tuple(left.shape)} and {rows.shape}; both need two axes")
    best = _RunningTopK(len(left), min(k, len(rows)), left.device)
    query_rows = max(1, block_bytes // (4 * min(corpus_rows, max(1, len(rows)))))
    for start, block in _blocks(rows, corpus_rows, similarity, dim):
        if block.shape[1] != left.shape[1]:
            raise MmembedError(
                f"top_k: queries have {left.shape[1]} dimensions, the corpus {block.shape[1]}; "
                "encode both with one model and one truncate_dim"
            )
        right = block.to(device).T  # (E, n)
        for first in range(0, len(left), query_rows):
            best.update(first, left[first : first + query_rows] @ right, start)  # (q, n)
    return Hits(best.scores.cpu().numpy(), best.indices.cpu().numpy())


def _blocks(rows: NDArray[Any], size: int, similarity: Similarity, dim: int | None) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), size):
        yield start, _prepare(rows[start : start + size], similarity, dim, "corpus", start)


def _array(vectors: NDArray[Any] | Tensor) -> NDArray[Any]:
    return vectors.detach().cpu().numpy() if isinstance(vectors, Tensor) else vectors


def _prepare(rows: NDArray[Any], similarity: Similarity, dim: int | None, name: str, start: int = 0) -> Tensor:
    """Stored rows -> (n, E) float32 whose dot products are the similarity."""
    vectors = decode(rows, dim)
    if similarity == "cosine" and rows.dtype.kind == "f":
        vectors = unit_rows(vectors)
    if not np.isfinite(vectors).all():
        row = start + int(np.flatnonzero(~np.isfinite(vectors).all(axis=-1))[0])
        raise MmembedError(f"top_k: row {row} of the {name} holds NaN or infinity; encode it again in float32")
    return torch.from_numpy(np.require(vectors, requirements=["C", "W"]))


class _RunningTopK:
    """The best k (score, index) of each query over the blocks seen so far, sorted, ties by the smaller index.

    Blocks must come in the order of the corpus: a stable sort of [kept, new] then keeps the smaller index first.
    """

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((queries, k), -torch.inf, device=device)  # (Q, k)
        self.indices = torch.full((queries, k), -1, dtype=torch.int64, device=device)  # (Q, k)

    def update(self, first: int, scores: Tensor, start: int) -> None:
        """Takes scores (q, n) of queries first.. against corpus rows start.. ."""
        if self.k == 0 or not len(scores):
            return
        rows = slice(first, first + len(scores))
        if start < self.k:  # not yet k candidates everywhere: there is no threshold to compare with
            new_scores, new_indices = _first_k(scores, self.k)
        else:
            new_scores, new_indices = _above(scores, self.scores[rows, -1:])
        new_indices = torch.where(new_scores > -torch.inf, new_indices + start, -1)
        merged = torch.cat([self.scores[rows], new_scores], dim=1)  # (q, k + m)
        order = torch.sort(merged, dim=1, descending=True, stable=True).indices[:, : self.k]  # (q, k)
        self.scores[rows] = merged.gather(1, order)
        self.indices[rows] = torch.cat([self.indices[rows], new_indices], dim=1).gather(1, order)


def _first_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of each row (q, n), sorted, ties by column.

    `torch.topk` picks any of several equal scores at its boundary; the few rows where that matters are sorted whole.
    """
    k = min(k, scores.shape[1])
    columns = torch.topk(scores, k, dim=1, sorted=False).indices.sort(dim=1).values  # (q, k) by column
    values = scores.gather(1, columns)
    order = torch.sort(values, dim=1, descending=True, stable=True)
    values, columns = order.values, columns.gather(1, order.indices)
    tied = ((scores >= values[:, -1:]).sum(dim=1) > k).nonzero().squeeze(1)
    if len(tied):
        full = torch.sort(scores[tied], dim=1, descending=True, stable=True)
        values[tied], columns[tied] = full.values[:, :k], full.indices[:, :k]
    return values, columns


def _above(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """All scores (q, n) above each row's threshold (q, 1), packed left in column order, padded with -inf: (q, m).

    An equal score loses against the kept one, whose index is smaller.
    """
    rows, columns = (scores > threshold).nonzero(as_tuple=True)  # (c,) each, row-major
    counts = torch.bincount(rows, minlength=len(scores))  # (q,)
    width = int(counts.max()) if len(rows) else 0
    position = torch.arange(len(rows), device=scores.device) - (counts.cumsum(0) - counts)[rows]  # (c,)
    packed = scores.new_full((len(scores), width), -torch.inf)  # (q, m)
    indices = torch.zeros(len(scores), width, dtype=torch.int64, device=scores.device)
    packed[rows, position] = scores[rows, columns]
    indices[rows, position] = columns
    return packed, indices
