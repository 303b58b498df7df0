"""Exact top-k search over vectors that need not fit in memory.

The corpus is read block after block (a memory-mapped .npy is never loaded whole) and multiplied with blocks of queries.
The product only has to say which rows can not be among the best k; those that can are scored again, exactly, at the
end. So it may be taken in bfloat16, which matrix units (AMX, AVX-512 BF16, GPUs) compute ten times as fast:

    a product x of rounded vectors is within B = |q - q'| |d| + |q'| |d - d'| + rounding of the score s
    L = k-th best x so far - B is at most the k-th best score
    a row with x < L - B is not among the best k; every other is kept

|q - q'| is computed, not estimated, so nothing is lost, and ties are exact. Vectors are centred first (q (d - mean)
ranks as q d does), which makes B small where all vectors point one way, as those of untrained models do. Where still
too many rows lie within B of the k-th best, the block of queries goes on in float32, whose B is a thousandth; and where
even that keeps too many, they are scored at once and k of them kept.

Most of a block is below L - B: the largest of each 8 rows is compared with it, not each row, as 16-bit integers
(positive bfloat16 numbers are ordered as their bits are).

L is low as long as few rows were seen. So the first block of a large corpus is made of rows from all over it, S of N,
and tells what L will be in the end: its r-th best product - B, where r is 3 standard deviations above the k S / N rows
that it should have of the best k. What lies below this guess is dropped as well. At the end the k-th best score says
whether that was right; the queries of which it was not, one in a thousand, are searched again without a guess.

    time    O(Q N E) multiply-adds, plus O(Q k log(N / k)) candidates
    memory  blocks of scores and of the corpus, one a thread, and O(Q (E + k)); independent of N

Ties are broken by the smaller row. Neither block sizes nor threads nor the precision of the products change anything.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mmembed.errors import MmembedError, nearest
from mmembed.search.vectors import Hits, Rows, Similarity, Vectors, check_sizes, score
from mmembed.threads import ahead, beside_each_other

logger = logging.getLogger(__name__)
Products = Literal["auto", "bfloat16", "float32"]
BLOCK_BYTES = 8 << 20  # one block of scores; 8 MB stays in the last cache level while it is compared
CORPUS_ROWS = 8192  # rows read at a time: large enough for the product's peak rate, 8 MB at 256 dimensions
GPU_BLOCK_BYTES, GPU_CORPUS_ROWS = 512 << 20, 65536
DENSE = 64  # where one row in so many is a candidate, a float32 product costs less than scoring them
GROUP = 8  # rows of the corpus whose largest score is compared
HIT_GROUPS = 1 << 16  # groups that are looked into at a time
SCORED = 512  # pairs that are scored at a time; 4,096 took a fifth longer
JOINED = 24  # parts whose candidates are scored together, at most, so that a row is read once for all of them
SAMPLED = 4  # blocks of a corpus, at least, of which one is taken from all over it
QUERY_BYTES = 512 << 20  # queries and candidates of a pass over the corpus
FEW = 64  # queries for which converting the corpus to bfloat16 costs more than it saves
SMALLEST = 2.0**-126  # matrix units take smaller numbers for 0
LARGEST = 1e18  # length of a vector: products of two stay finite in float32
Floats = NDArray[np.float64]
_How = tuple[Rows, int, bool, torch.device, int, int]  # what `_Search` takes beside the queries


def top_k(
    queries: Vectors,
    corpus: Vectors,
    k: int,
    *,
    similarity: Similarity = "cosine",
    dim: int | None = None,
    corpus_rows: int | None = None,
    block_bytes: int | None = None,
    products: Products = "auto",
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> Hits:
    """The k corpus rows most similar to each query, exactly.

    Args:
        queries: (Q, W) vectors in any precision of `mmembed.quantize`: an array, memory map or tensor, or the path of a
            .npy file.
        corpus: (N, W) vectors, likewise. Queries may be float against an int8 or binary corpus.
        k: how many; at least 1.
        similarity: "cosine", or "dot" of the decoded vectors.
        dim: of binary vectors, the dimensions before packing (needed only where it is no multiple of 8).
        corpus_rows, block_bytes: block sizes; they bound the memory and never change the result.
        products: precision of the products that find candidates: "auto" is bfloat16 where the device has units for it
            and there are queries enough. It never changes the result.
        device: where the products are computed.
        show_progress: a bar with rate and time left.

    Returns:
        Hits: scores (Q, k) falling, ties by the smaller row. Where the corpus has fewer than k rows, k is its size.

    Raises:
        MmembedError: widths differ, k < 1, or a vector that is not finite or too long for float32.
    """
    if k < 1:
        raise MmembedError(f"top_k: k is {k}; give at least 1")
    if products not in ("auto", "bfloat16", "float32"):
        raise MmembedError(f"products: there is no '{products}'; {nearest(products, ['auto', 'bfloat16', 'float32'])}")
    left, right = Rows(queries, similarity, "queries", dim), Rows(corpus, similarity, "corpus", dim)
    k = min(k, len(right))
    hits = Hits(np.empty((len(left), k), np.float32), np.empty((len(left), k), np.int64))
    if not k or not len(left):
        return hits
    check_sizes(left.size, right.size)
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    pass_rows = max(1, QUERY_BYTES // (8 * left.size + 16 * _budget(k)))
    size = corpus_rows or (CORPUS_ROWS if on_cpu else GPU_CORPUS_ROWS)
    passes = range(0, len(left), pass_rows)
    with tqdm(
        total=len(passes) * len(right), desc="search", unit=" rows", delay=1.0, disable=not show_progress
    ) as progress:
        for first in passes:
            asked = left.read(first, min(first + pass_rows, len(left)))  # (q, E)
            narrow = products == "bfloat16" or (products == "auto" and len(asked) >= FEW and has_units(device))
            block = block_bytes or (BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES)
            at = slice(first, first + len(asked))
            try:
                found = _searched(asked, (right, k, narrow, device, block, size), progress)
            except _BoundBroken:
                if not narrow:
                    raise MmembedError(
                        "search: float32 products round more than float32; set torch.backends.fp32_precision to 'ieee'"
                    ) from None
                logger.warning("search: bfloat16 products are less exact than they should be here; float32 instead")
                found = _searched(asked, (right, k, False, device, block, size), progress)
            hits.scores[at], hits.indices[at] = found
    return hits


def _searched(
    queries: NDArray[np.float32], how: _How, progress: tqdm[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores (Q, k) and rows (Q, k)."""
    scores, found, missed = _Search(queries, *how).run(progress)
    if missed.any():
        progress.total = (progress.total or 0) + len(how[0])
        scores[missed], found[missed], _ = _Search(queries[missed], *how, guess=False).run(progress)
    return scores, found


def has_units(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there, and sum in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool((cpu.get("amx_bf16") or cpu.get("avx512_bf16")) and torch.backends.mkldnn.enabled)


class _BoundBroken(Exception):
    """A product is farther from its score than it can be: the device rounds more than it says."""


@dataclass
class _Block:
    """Rows of the corpus, rising, centred: (n, E), and in bfloat16 where that is wanted."""

    rows: NDArray[np.int64]  # (n,)
    plain: Tensor
    narrow: Tensor | None
    length: float  # of the longest centred row, at least
    error: float  # distance of a centred row from its bfloat16 neighbour, at most


@dataclass
class _Part:
    """Some queries, and the rows that may be among their best. Values are of centred rows, q (d - mean)."""

    first: int  # place of the first query among all
    queries: NDArray[np.float32]  # (q, E)
    given: Tensor  # (q, E) as they enter products, bfloat16 or float32
    length: Floats  # (q,) |q|
    error: Floats  # (q,) |q - given|
    offset: Floats  # (q,) q mean
    bound: Floats = field(init=False)  # (q,) B of the candidates
    least: Floats = field(init=False)  # (q,) L
    needed: Floats = field(init=False)  # (q,) what a later row has to reach; a tie loses against the smaller row
    guess: Floats = field(init=False)  # (q,) products below it are dropped, although some may be among the best k
    least_sure: Floats = field(init=False)  # (q,) nothing that the guess dropped scores above this
    longest: float = 0.0  # of the rows so far, centred
    enough: int = 0  # candidates that may wait before they are pruned
    seen: int = 0  # rows since candidates were settled
    columns: list[NDArray[np.int64]] = field(default_factory=list)  # of each candidate: its query,
    rows: list[NDArray[np.int64]] = field(default_factory=list)  # its row,
    values: list[NDArray[np.float32]] = field(default_factory=list)  # the product

    def __post_init__(self) -> None:
        count = len(self.queries)
        self.bound = np.zeros(count)
        self.least, self.needed = np.full(count, -np.inf), np.full(count, -np.inf)
        self.guess, self.least_sure = np.full(count, -np.inf), np.full(count, -np.inf)

    @property
    def narrow(self) -> bool:
        return self.given.dtype == torch.bfloat16

    @property
    def waiting(self) -> int:
        return sum(map(len, self.rows))

    def add(self, columns: NDArray[np.int64], rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        self.columns.append(columns)
        self.rows.append(rows)
        self.values.append(values)

    def drain(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """All candidates; none are left."""
        if not self.rows:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        drained = np.concatenate(self.columns), np.concatenate(self.rows), np.concatenate(self.values)
        self.columns, self.rows, self.values = [], [], []
        return drained

    def raise_least(self, best: Floats) -> None:
        """`best` (q,): k products of other rows each reach it; -inf where there are no k."""
        self.least = np.maximum(self.least, best - self._rounded(np.maximum(best, -(LARGEST**2))) - self.bound)
        self.needed = np.maximum(self.needed, self.least)

    def raise_bound(self, bound: Floats) -> None:
        self.bound = np.maximum(self.bound, bound)
        guessed = np.isfinite(self.guess)
        dropped = self.guess[guessed]
        self.least_sure[guessed] = np.maximum(
            self.least_sure[guessed], dropped + self._rounded(dropped) + self.bound[guessed]
        )

    def _rounded(self, products: Floats) -> Floats:
        """How far rounding to bfloat16 moved them, at most."""
        return np.abs(products) * (2.0**-8 * self.narrow)

    def guess_from(self, best: Floats) -> None:
        """`best` (q,): products that the k-th best score should not be below."""
        self.guess = best - 1.01 * (self._rounded(best) + self.bound)  # a score of `best` is sure, then
        self.raise_bound(self.bound)

    def floor(self, scores: Tensor) -> Tensor:
        """(q,) in the dtype of `scores` (n, q), rounded down: products below it are dropped."""
        floor = np.maximum(self.needed - self.bound, self.guess)
        return _rounded_down(floor, scores.dtype == torch.bfloat16).to(scores.device, scores.dtype)


class _Search:
    """One pass over the corpus with queries (Q, E)."""

    def __init__(
        self,
        queries: NDArray[np.float32],
        corpus: Rows,
        k: int,
        narrow: bool,
        device: torch.device,
        block_bytes: int,
        rows: int,
        guess: bool = True,
    ) -> None:
        self.queries, self.corpus, self.k, self.narrow = queries, corpus, k, narrow
        self.device, self.block_bytes = device, block_bytes
        self.rows = min(rows, len(corpus))
        self.stride = len(corpus) // self.rows  # of the rows of the first block, where it is a sample
        expected = k * self.rows / len(corpus)  # rows of it that are among the best k
        self.rank = math.ceil(expected + 3 * math.sqrt(expected)) + 1
        self.sampled = guess and self.stride >= SAMPLED and self.rank < min(k, self.rows)
        sample = corpus.take(np.arange(0, len(corpus), max(1, len(corpus) // 1024)))
        with np.errstate(invalid="ignore", over="ignore"):
            mean = sample.astype(np.float64).mean(axis=0).astype(np.float32)  # (E,)
        self.mean = mean if np.isfinite(mean).all() else np.zeros_like(mean)
        self.reach = float(np.linalg.norm(self.mean.astype(np.float64)))
        # Sums of E products in float32, in any order; GPUs cut bits off where CPUs round.
        self.rounding = queries.shape[1] * 2.0 ** (-24 if device.type == "cpu" else -21)
        # Where the caller lets float32 products be rounded, to TF32 or bfloat16, each vector may lose 16 bits.
        self.loose = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
        self.buffers: deque[Tensor] = deque()

    def run(self, progress: tqdm[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """Scores (Q, k), rows (Q, k), and the queries (Q,) of which some of these may be wrong: the guess was."""
        threads = torch.get_num_threads()
        parts = list(self._cut(threads))
        workers = min(threads, len(parts)) if self.device.type == "cpu" else 1
        for number, block in enumerate(ahead(self._spans(), self._read, 1)):
            if workers > 1:
                for _ in beside_each_other(parts, partial(self._take, block=block), workers):
                    pass
            else:
                for part in parts:
                    self._take(part, block)
            if self.sampled and number == 0:
                for part in parts:
                    part.needed = part.least.copy()  # smaller rows are still to come
            progress.update(len(block.rows))
        count = -(-len(parts) // (JOINED * workers)) * workers
        groups = [parts[len(parts) * one // count : len(parts) * (one + 1) // count] for one in range(count)]
        found = [one for group in ahead(groups, self._results, min(threads, count)) for one in group]
        scores, rows, missed = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(rows), np.concatenate(missed)

    def _spans(self) -> Iterator[NDArray[np.int64]]:
        """The rows of each block, rising: a sample of all, then the others in their order."""
        size, step = len(self.corpus), self.rows
        if self.sampled:
            yield np.arange(self.rows) * self.stride
            step = self.rows * self.stride // (self.stride - 1)
        for start in range(0, size, step):
            rows = np.arange(start, min(start + step, size))
            if self.sampled:
                rows = rows[(rows % self.stride != 0) | (rows >= self.rows * self.stride)]
            if len(rows):
                yield rows

    def _cut(self, threads: int) -> Iterator[_Part]:
        """Queries in parts whose scores with a block fit; two parts at least a thread."""
        fit = max(1, self.block_bytes // ((2 if self.narrow else 4) * self.rows))
        share = -(-len(self.queries) // (2 * threads)) if self.device.type == "cpu" else fit
        step = min(fit, max(share, FEW))
        for first in range(0, len(self.queries), step):
            queries = self.queries[first : first + step]
            wide = queries.astype(np.float64)
            length = np.sqrt((wide * wide).sum(axis=1))  # (q,)
            _check_length(float(length.max()))
            given, error = torch.from_numpy(queries), np.zeros(len(queries))
            if self.narrow:
                given = given.bfloat16()
                error = np.sqrt(((wide - given.double().numpy()) ** 2).sum(axis=1))
            yield _Part(first, queries, given.to(self.device), length, error, wide @ self.mean.astype(np.float64))

    def _read(self, rows: NDArray[np.int64]) -> _Block:
        first, last = int(rows[0]), int(rows[-1])
        if last - first < 2 * len(rows):
            given = self.corpus.read(first, last + 1)
            given = given if len(given) == len(rows) else given[rows - first]
        else:
            given = self.corpus.take(rows, checked=True)
        plain = torch.from_numpy(given - self.mean)  # (n, E)
        length = float(torch.linalg.vector_norm(plain, dim=1).max()) * 1.01  # norms in float32, rounded differences
        _check_length(length)
        narrow, error = None, 0.0
        if self.narrow:
            narrow = plain.bfloat16()
            error = float(torch.linalg.vector_norm(plain - narrow.float(), dim=1).max()) * 1.01
            narrow = narrow.to(self.device)
        return _Block(rows, plain.to(self.device), narrow, length, error)

    # Candidates -------------------------------------------------------------------------------------------------------

    def _take(self, part: _Part, block: _Block) -> None:
        """The rows of a block that may be among the best k of the part's queries become candidates."""
        part.longest = max(part.longest, block.length)
        part.raise_bound(self._bound(part, block))
        part.seen += len(block.rows)
        scores, buffer = self._product(part, block)  # (n, q)
        maxima = self._maxima(part, scores)  # (G, q)
        groups, columns = _places(_reach(maxima, part.floor(scores)))  # (c,) each, groups rising
        for start in range(0, len(groups), HIT_GROUPS):
            looked = groups[start : start + HIT_GROUPS]
            self._look(part, scores, looked, columns[start : start + HIT_GROUPS], block.rows)
            if part.waiting <= min(part.enough, len(part.queries) * _budget(self.k)):
                continue
            self._prune(part)
            part.enough = part.waiting * 2  # L rises fastest at the start
            if part.waiting <= len(part.queries) * _budget(self.k) * 3 // 4:
                continue
            if part.narrow and part.waiting * DENSE > part.seen * len(part.queries):
                self._widen(part, block)
                self._keep(buffer)
                self._take(part, block)
                return
            self._settle(part, reached=int(block.rows[int(looked[-1]) * GROUP]))
        self._keep(buffer)

    def _bound(self, part: _Part, block: _Block) -> Floats:
        """(q,) how far a product may be from the score of the centred row."""
        length = part.length + part.error
        bound = length * (self.rounding + 2.0**-22) * (part.longest + self.reach)
        bound += len(self.mean) * SMALLEST * (2 + length + part.longest)
        if part.narrow:
            bound += part.error * part.longest + length * block.error
        else:
            bound += self.loose * length * part.longest
        return bound * 1.01

    def _product(self, part: _Part, block: _Block) -> tuple[Tensor, Tensor | None]:
        """-> scores (n, q), and the buffer that they are in."""
        right = block.narrow if part.narrow else block.plain
        assert right is not None, "parts are narrow only in a search that is"
        if self.device.type == "cuda" and part.narrow:
            return torch.mm(right, part.given.T, out_dtype=torch.float32), None
        size = len(right) * len(part.given)
        buffer = self.buffers.pop() if self.buffers else right.new_empty(0)
        if buffer.dtype != right.dtype or len(buffer) < size:
            buffer = right.new_empty(size)
        return torch.mm(right, part.given.T, out=buffer[:size].view(len(right), -1)), buffer

    def _keep(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self.buffers.append(buffer)

    def _maxima(self, part: _Part, scores: Tensor) -> Tensor:
        """The largest of each group of rows, (G, q), right where it is above the floor; finds the first floor."""
        bits = scores.dtype == torch.bfloat16
        maxima = _group_maxima(scores, bits)
        rank = self.rank if self.sampled else self.k
        if np.isneginf(part.guess if self.sampled else part.least).any() and len(scores) >= rank:
            best = self._best_but(rank, scores, maxima)
            if bits and not best.min() > 0:  # negative numbers are not ordered as their bits are
                bits, maxima = False, _group_maxima(scores, False)
                best = self._best_but(rank, scores, maxima)
            if self.sampled:
                part.guess_from(best)
                part.enough = 2 * self.k * len(part.queries)
            else:
                part.raise_least(best)
        if bits and not (part.floor(scores) > 0).all():
            maxima = _group_maxima(scores, False)
        return maxima

    def _best_but(self, rank: int, scores: Tensor, maxima: Tensor) -> Floats:
        """(q,) numbers that `rank` of the scores reach, each."""
        among = maxima if len(maxima) >= rank else scores
        coarse = len(maxima) // GROUP * GROUP
        if coarse >= 4 * GROUP * rank:  # nearly as high a number, found in an eighth of the time
            among = maxima[:coarse].view(-1, GROUP, maxima.shape[1]).amax(1)
        values = among.T.float().contiguous()  # (q, n)
        if values.device.type != "cpu":
            return values.topk(rank, dim=1).values[:, -1].double().cpu().numpy()
        place = values.shape[1] - rank
        return np.partition(values.numpy(), place, axis=1)[:, place].astype(np.float64)  # twice as fast as topk

    def _look(self, part: _Part, scores: Tensor, groups: Tensor, columns: Tensor, rows: NDArray[np.int64]) -> None:
        """Adds what is above the floor in these groups (c,) of these columns (c,); the block's rows are `rows`."""
        width = scores.shape[1]
        places = torch.arange(GROUP, device=scores.device) * width + (groups * (GROUP * width) + columns).unsqueeze(1)
        there = places < scores.numel()  # (c, GROUP); the last group may be short
        values = scores.view(-1).take(places if len(scores) % GROUP == 0 else places.clamp(max=scores.numel() - 1))
        above = values >= part.floor(scores).take(columns).unsqueeze(1)
        hit = (above & there).view(-1).nonzero().squeeze(1)  # (h,)
        found = places.view(-1).take(hit).cpu().numpy()
        part.add(found % width, rows[found // width], values.view(-1).take(hit).float().cpu().numpy())

    def _prune(self, part: _Part) -> None:
        """Raises L to what the candidates say, and drops those below."""
        columns, rows, values = part.drain()
        keys = np.sort(_by_column_and_value(columns, values))
        counts = np.bincount(columns, minlength=len(part.queries))  # (q,)
        full = np.flatnonzero(counts >= self.k)
        best = np.full(len(part.queries), -np.inf)
        best[full] = _value_of(keys[(counts.cumsum() - counts)[full] + self.k - 1], full)
        part.raise_least(best)
        floor = _rounded_down(part.least - part.bound, part.narrow).numpy()
        kept = values >= floor[columns]
        part.add(columns[kept], rows[kept], values[kept])

    def _widen(self, part: _Part, block: _Block) -> None:
        """The part goes on in float32, from the beginning of this block on."""
        columns, rows, values = part.drain()
        before = ~np.isin(rows, block.rows)
        part.add(columns[before], rows[before], values[before])
        part.needed = part.least.copy()  # rows that are found again must not lose against themselves
        self._settle(part, reached=int(block.rows[0]))
        part.given, part.error = torch.from_numpy(part.queries).to(self.device), np.zeros(len(part.queries))
        part.bound = np.zeros(len(part.queries))

    def _settle(self, *parts: _Part, reached: int) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Scores all candidates and keeps the best k of each query: scores and rows, by query and score.

        Rows of later candidates are `reached` at least.
        """
        drained = [part.drain() for part in parts]
        columns = np.concatenate([part.first + one[0] for part, one in zip(parts, drained, strict=True)])
        scores = self._score(columns, np.concatenate([rows for _, rows, _ in drained]))
        ends = np.cumsum([len(rows) for _, rows, _ in drained])
        of_parts = np.split(scores, ends[:-1])
        return [
            self._best(part, *one, found, reached) for part, one, found in zip(parts, drained, of_parts, strict=True)
        ]

    def _score(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) the scores of queries with rows. Rows are read in one direction, each once."""
        order = np.argsort(rows)
        rows, columns = rows[order], columns[order]
        found, new = np.empty(len(rows), np.float32), np.ones(len(rows), bool)
        new[1:] = rows[1:] != rows[:-1]
        new[::SCORED] = True
        left, right = np.empty((2, min(SCORED, len(rows)), self.queries.shape[1]), np.float32)
        for start in range(0, len(rows), SCORED):
            span = slice(start, start + SCORED)
            first = new[span]
            queries, taken = left[: len(first)], right[: len(first)]
            self.queries.take(columns[span], axis=0, out=queries, mode="clip")  # checked modes take a copy
            self.corpus.take(rows[span][first]).take(first.cumsum() - 1, axis=0, out=taken, mode="clip")
            found[span] = score(queries, taken)
        scores = np.empty_like(found)
        scores[order] = found
        return scores

    def _best(
        self,
        part: _Part,
        columns: NDArray[np.int64],
        rows: NDArray[np.int64],
        values: NDArray[np.float32],
        scores: NDArray[np.float32],
        reached: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Keeps the best k of each query, of equal ones the smaller rows."""
        centred = scores - part.offset[columns]
        if (np.abs(values - centred) > part.bound[columns] + np.abs(values) * 2.0**-8 * part.narrow).any():
            raise _BoundBroken
        order = _ordered(_by_column_and_value(columns, scores), rows)
        counts = np.bincount(columns, minlength=len(part.queries))  # (q,)
        places = np.arange(len(order)) - (counts.cumsum() - counts)[columns[order]]
        order = order[places < self.k]
        columns, rows, scores = columns[order], rows[order], scores[order]
        part.add(columns, rows, centred[order].astype(np.float32))
        full = counts >= self.k
        last, row = np.full(len(part.queries), -np.inf, np.float32), np.zeros(len(part.queries), np.int64)
        place = np.minimum(counts, self.k).cumsum()[full] - 1
        last[full], row[full] = scores[place], rows[place]
        part.least = np.maximum(part.least, last - part.offset)
        above = np.where(part.length > 0, np.nextafter(last, np.float32(np.inf)), np.float32(np.inf))
        above = np.where(row < reached, above, last)  # of equal ones the smaller row is better
        part.needed = np.maximum(part.needed, np.where(full, above - part.offset, -np.inf))
        part.seen = 0
        return scores, rows

    def _results(self, parts: list[_Part]) -> list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]]:
        for part in parts:
            if part.waiting:
                self._prune(part)
        found = self._settle(*parts, reached=len(self.corpus))
        return [self._filled(part, *one) for part, one in zip(parts, found, strict=True)]

    def _filled(
        self, part: _Part, scores: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """Scores (q, k), rows (q, k), and the queries (q,) that a guess may have cost some of them."""
        missed = part.least < part.least_sure
        if len(scores) == len(part.queries) * self.k:
            return scores.reshape(-1, self.k), rows.reshape(-1, self.k), missed
        counts = np.bincount(part.columns[-1], minlength=len(part.queries))
        whole = counts == self.k
        table = np.zeros((len(counts), self.k), np.float32), np.zeros((len(counts), self.k), np.int64)
        there = np.repeat(whole, counts)
        table[0][whole], table[1][whole] = scores[there].reshape(-1, self.k), rows[there].reshape(-1, self.k)
        return *table, missed | ~whole


def _budget(k: int) -> int:
    """Candidates of a query that may wait before those that fell behind are dropped."""
    return 2 * k + 128


def _check_length(length: float) -> None:
    if not length <= LARGEST:
        raise MmembedError("search: products of these vectors leave float32; compare by cosine")


def _group_maxima(scores: Tensor, bits: bool) -> Tensor:
    """(n, q) -> the largest of each GROUP rows, (G, q). By their bits: right where it is positive, else not above 0."""
    values = scores.view(torch.int16) if bits else scores
    full = len(values) // GROUP * GROUP
    maxima = [values[:full].view(-1, GROUP, values.shape[1]).amax(1)]
    if full < len(values):
        maxima.append(values[full:].amax(0, keepdim=True))
    return torch.cat(maxima).view(scores.dtype)


def _reach(maxima: Tensor, floor: Tensor) -> Tensor:
    """(G, q) bool: not below the floor (q,). Positive bfloat16 numbers are compared as integers, which is faster."""
    if maxima.dtype == torch.bfloat16 and (floor > 0).all():
        return maxima.view(torch.int16) >= floor.view(torch.int16)
    return maxima >= floor


def _places(marked: Tensor) -> tuple[Tensor, Tensor]:
    """(G, q) bool -> the row and the column of each mark, by row. numpy finds few marks in half of torch's time."""
    if marked.device.type != "cpu":
        rows, columns = marked.nonzero(as_tuple=True)
        return rows, columns
    row, column = np.divmod(np.flatnonzero(marked.numpy()), marked.shape[1])
    return torch.from_numpy(row), torch.from_numpy(column)


def _rounded_down(values: Floats, narrow: bool) -> Tensor:
    """The next float32 (or bfloat16) that is not above: (q,) float32."""
    rounded = values.astype(np.float32)
    rounded = np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    if narrow:
        bits = rounded.view(np.uint32)
        rounded = ((bits + np.where(rounded < 0, np.uint32(0xFFFF), np.uint32(0))) & np.uint32(0xFFFF0000)).view(
            np.float32
        )
    return torch.from_numpy(rounded)


def _by_column_and_value(columns: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers that order by column, then by falling value."""
    bits = values.view(np.int32).astype(np.int64)
    rising = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # ordered as the values are
    return (columns << 33) - rising


def _value_of(keys: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """The values of such integers."""
    rising = (columns << 33) - keys
    return np.where(rising < 0, -rising | -0x80000000, rising).astype(np.int32).view(np.float32)


def _ordered(keys: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of keys, of equal ones by their row. Sorts once where no two are equal, which is nearly always."""
    order = np.argsort(keys)
    found = keys[order]
    return np.lexsort((rows, keys)) if (found[1:] == found[:-1]).any() else order
