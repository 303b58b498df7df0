"""How sure a score is, and whether two systems differ on one task: intervals and paired tests over its rows.

A row is a query, a labelled text or a pair of sentences. A `mean` has one value a row; `spearman` is a correlation of
two, what the model says and what people said. Three procedures, each 10,000 draws of a fixed seed:

    interval         percentiles of the score of N rows drawn anew with replacement (Efron 1979)
    paired interval  the same draws for both systems, percentiles of the difference
    paired test      both systems' values of a row change places by a coin: how often is the difference as large
                     (Fisher's randomization; Smucker et al., CIKM 2007, recommend it and the bootstrap for retrieval)

Of a correlation the values that change places are ranks within each system, since cosines of two models share no
scale; ranks are then taken anew. Several tasks are corrected by Holm's method (1979). Rows are taken to be independent,
and to be a sample: nothing here knows of another test set.

Cost: 10,000 x N draws: .9 s for 2,000 rows of a mean, 2.6 s for 900 pairs of a correlation and 12 s to compare two, on
a busy core. Memory is bounded by `BLOCK`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmembed.errors import MmembedError
from mmembed.metrics import Floats, average_ranks, spearman

Statistic = Literal["mean", "spearman"]
CONFIDENCE, SAMPLES, SEED = 0.95, 10_000, 0
BLOCK = 4_000_000  # numbers drawn at once: 32 MB
EXACT = 12  # rows up to which all 2^N ways to change places are tried


@dataclass(frozen=True)
class Paired:
    """Two systems on the same rows.

    Attributes:
        difference: of the scores, the first minus the second. low, high: its 95 % interval.
        p: of a difference as large or larger, either way, if the two were exchangeable.
    """

    difference: float
    low: float
    high: float
    p: float


def score(rows: ArrayLike, statistic: Statistic = "mean") -> float:
    """The score of rows: (N,) of a mean, (N, 2) of a correlation. Raises MmembedError for another shape."""
    values = _rows(rows, statistic)
    return float(values.mean()) if statistic == "mean" else spearman(values[:, 0], values[:, 1])


def interval(
    rows: ArrayLike, statistic: Statistic = "mean", samples: int = SAMPLES, seed: int = SEED
) -> tuple[float, float] | None:
    """The 95 % percentile interval of `score`; None for fewer than two rows, or where nothing varies.

    >>> [round(bound, 2) for bound in interval([0.0, 1.0] * 50)]  # 0.5 -+ 1.96 * 0.5 / sqrt(100)
    [0.4, 0.6]
    """
    values = _rows(rows, statistic)
    if len(values) < 2 or not (values != values[0]).any(axis=0).all():
        return None
    return _percentiles(
        np.concatenate([_scores(values, counts, statistic) for counts in _drawn(values, samples, seed)])
    )


def interval_of_means(tasks: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Of the mean over tasks of the mean over each task's rows, drawn task by task; None where nothing differs.

    >>> low, high = interval_of_means([[0.0, 0.1] * 50])  # 0.05 -+ 1.96 * 0.05 / sqrt(100)
    >>> round(low, 2), round(high, 2)
    (0.04, 0.06)
    """
    values = [np.asarray(task, dtype=np.float64) for task in tasks if len(task) > 1]
    if len(values) < len(tasks) or not any(task.std() > 0 for task in values):
        return None
    means = [
        np.concatenate([_scores(task, counts, "mean") for counts in _drawn(task, SAMPLES, SEED + number)])
        for number, task in enumerate(values)
    ]
    return _percentiles(np.mean(means, axis=0))


def paired(
    ours: ArrayLike, theirs: ArrayLike, statistic: Statistic = "mean", samples: int = SAMPLES, seed: int = SEED
) -> Paired:
    """Compares two systems row by row.

    Args:
        ours, theirs: rows as `score` takes them, in one order.

    Raises:
        MmembedError: the two have different rows, or people's values of a correlation differ.
    """
    a, b = _rows(ours, statistic), _rows(theirs, statistic)
    if a.shape != b.shape or (statistic == "spearman" and not np.array_equal(a[:, 1], b[:, 1])):
        raise MmembedError(
            f"paired: rows {a.shape} and {b.shape} are not those of one task; give the same in one order"
        )
    difference = score(a, statistic) - score(b, statistic)
    drawn = [
        _scores(a, counts, statistic) - _scores(b, counts, statistic) for counts in _drawn(a, samples, seed)
    ]  # of the same rows for both
    low, high = _percentiles(np.concatenate(drawn))
    return Paired(difference, low, high, exchange_test(a, b, statistic, samples, seed))


def exchange_test(
    ours: Floats, theirs: Floats, statistic: Statistic = "mean", samples: int = SAMPLES, seed: int = SEED
) -> float:
    """The two-sided p of the paired randomization test; exact for `EXACT` rows or fewer, else (1 + b) / (1 + samples).

    Args:
        ours, theirs: as of `paired`.
    """
    if statistic == "spearman":
        a, b = average_ranks(ours[:, 0]), average_ranks(theirs[:, 0])
        gold = average_ranks(ours[:, 1])

        def difference(swapped: NDArray[np.bool_]) -> Floats:
            sides = (np.where(swapped, b, a), np.where(swapped, a, b))  # (S, N) each
            one, other = (_correlation(_ranked_rows(side), gold) for side in sides)
            return one - other

    else:
        a, b = ours, theirs

        def difference(swapped: NDArray[np.bool_]) -> Floats:
            return (1.0 - 2.0 * swapped) @ (a - b) / len(a)

    observed = abs(difference(np.zeros((1, len(a)), dtype=bool))[0])
    at_least = observed - 1e-12  # equal but for rounding
    if len(a) <= EXACT:
        every = (np.arange(2 ** len(a))[:, None] >> np.arange(len(a))) & 1
        return float((np.abs(difference(every.astype(bool))) >= at_least).mean())
    generator, larger = np.random.default_rng(seed), 0
    for size in _blocks(samples, len(a)):
        larger += int((np.abs(difference(generator.random((size, len(a))) < 0.5)) >= at_least).sum())
    return (1 + larger) / (1 + samples)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p of each test such that one wrong alarm among all has the level's probability (Holm 1979), in the order given.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, least = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def _rows(rows: ArrayLike, statistic: Statistic) -> Floats:
    values = np.asarray(rows, dtype=np.float64)
    if values.shape[1:] != (() if statistic == "mean" else (2,)) or not len(values):
        wanted = "(N,)" if statistic == "mean" else "(N, 2)"
        raise MmembedError(
            f"significance: rows of a {statistic} have shape {values.shape}; give {wanted}, N at least 1"
        )
    return values


def _drawn(values: Floats, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each row is in each sample: blocks of (S, N)."""
    generator, rows = np.random.default_rng(seed), len(values)
    for size in _blocks(samples, rows):
        places = generator.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(places.ravel(), minlength=size * rows).reshape(size, rows)


def _blocks(samples: int, rows: int) -> Iterator[int]:
    size = max(1, min(samples, BLOCK // rows))
    yield from (min(size, samples - start) for start in range(0, samples, size))


def _scores(values: Floats, counts: NDArray[np.int64], statistic: Statistic) -> Floats:
    """(S,) scores of samples, in which row n stands `counts[s, n]` times."""
    if statistic == "mean":
        means: Floats = counts @ values / len(values)
        return means
    x, y = (_sample_ranks(values[:, side], counts) for side in (0, 1))  # (S, N)
    middle = (len(values) + 1) / 2
    x, y = x - middle, y - middle
    scale = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
    return np.divide((counts * x * y).sum(1), scale, out=np.zeros_like(scale), where=scale > 0)


def _sample_ranks(values: Floats, counts: NDArray[np.int64]) -> Floats:
    """(S, N) mean ranks that the values have in each sample: no sample is sorted, ranks are running sums of counts."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)  # (S, G) rows of each value
    ranks = sizes.cumsum(1) - (sizes - 1) / 2
    found: Floats = ranks[:, group]
    return found


def _ranked_rows(halves: Floats) -> Floats:
    """(S, N) mean ranks within each row, of values that are ranks themselves: whole or half numbers up to N."""
    places = np.rint(2 * halves).astype(np.int64)  # 2 ... 2 N
    width = 2 * halves.shape[1] + 1
    offsets = width * np.arange(len(halves))[:, None]
    counts = np.bincount((places + offsets).ravel(), minlength=width * len(halves)).reshape(-1, width)
    ranks = counts.cumsum(1) - (counts - 1) / 2
    return np.take_along_axis(ranks, places, axis=1)


def _correlation(rows: Floats, other: Floats) -> Floats:
    """(S,) Pearson's correlations of each row (S, N) with (N,); 0 where one is constant."""
    x, y = rows - rows.mean(1, keepdims=True), other - other.mean()
    scale = np.sqrt((x * x).sum(1) * (y @ y))
    return np.divide(x @ y, scale, out=np.zeros_like(scale), where=scale > 0)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
