"""Counts of streams in bounded memory: uniform samples, numbers, names, and digests that are sorted on disk.

Up to their bounds all of them are exact; what is more than that is a sample (percentiles), or is left out and said so
(names). Digests are exact always: 8 bytes each in a file without a name, which is read again a part at a time.
"""

from __future__ import annotations

import math
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
VALUES = 20_000  # numbers whose percentiles are exact
NAMES = 10_000  # that are counted apart
_PART = 10_000_000  # digests that are sorted in memory, 80 MB


class Reservoir(Generic[T]):
    """A uniform sample of a stream, in its order (Vitter 1985, algorithm R); the same again with the same seed."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen = size, 0
        self._random = random.Random(seed)
        self._kept: list[tuple[int, T]] = []

    def place(self) -> int | None:
        """Where the next of the stream would be kept; None: it is not. To be called once for each, before `put`."""
        self.seen += 1
        if self.seen <= self.size:
            return self.seen - 1
        chosen = int(self._random.random() * self.seen)
        return chosen if chosen < self.size else None

    def put(self, place: int, item: T) -> None:
        if place == len(self._kept):
            self._kept.append((self.seen, item))
        else:
            self._kept[place] = (self.seen, item)

    def items(self) -> list[T]:
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]

    def __len__(self) -> int:
        return len(self._kept)


class Numbers:
    """Count, mean, least and most of all; percentiles of a sample of `VALUES`."""

    def __init__(self, seed: int = 0) -> None:
        self.count, self._total, self.low, self.high = 0, 0.0, math.inf, -math.inf
        self._sample = array("d")
        self._random = random.Random(seed)

    def add(self, value: float) -> None:
        self.count += 1
        self._total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        if len(self._sample) < VALUES:
            self._sample.append(value)
        elif (chosen := int(self._random.random() * self.count)) < VALUES:
            self._sample[chosen] = value

    def values(self) -> NDArray[np.float64]:
        return np.frombuffer(self._sample, np.float64) if self._sample else np.empty(0)

    def as_dict(self) -> dict[str, Any]:
        """`percentiles` by number; `exact` says that they are of all values."""
        if not self.count:
            return {"count": 0, "mean": None, "percentiles": None, "exact": True}
        shown = {str(one): round(float(np.percentile(self.values(), one)), 6) for one in PERCENTILES}
        shown |= {"0": round(self.low, 6), "100": round(self.high, 6)}
        exact = self.count <= VALUES
        return {"count": self.count, "mean": round(self._total / self.count, 6), "percentiles": shown, "exact": exact}


class Names:
    """How often names occur. With more than `NAMES` different ones the rare ones are dropped as they come, and `exact`
    is false: what is left is counted too low by as much as it had when it was dropped."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.exact, self.total = True, 0

    def add(self, name: str) -> None:
        self.total += 1
        self._counts[name] += 1
        if len(self._counts) > 2 * NAMES:
            self._counts = Counter(dict(self._counts.most_common(NAMES)))
            self.exact = False

    def as_dict(self, shown: int) -> dict[str, Any]:
        """The balance of the names, and the most frequent of them.

        effective: how many equally frequent names would be as hard to guess (the exponential of the entropy).
        """
        counts = self._counts.most_common()
        if not counts:
            return {"total": 0, "distinct": 0, "exact": True, "effective": None, "least": None, "counts": {}}
        shares = [count / self.total for _, count in counts]
        effective = math.exp(-sum(share * math.log(share) for share in shares)) if self.exact else None
        return {
            "total": self.total,
            "distinct": len(counts),
            "exact": self.exact,
            "effective": None if effective is None else round(effective, 2),
            "least": counts[-1][1],
            "counts": dict(counts[:shown]),
        }


class Digests:
    """64-bit digests of a stream, in a file without a name below a folder.

    Two different contents of 100 million have the same one with a probability of 0.0003.
    """

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  # until `close`
        self._waiting = array("Q")

    def add(self, digest: int) -> None:
        self.count += 1
        self._waiting.append(digest)
        if len(self._waiting) >= 2**16:
            self._flush()

    def parts(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Distinct digests and how often each was there, in parts by their last bits."""
        for number in range(self.divisor):
            digests, counts = np.unique(self.part(number, self.divisor), return_counts=True)
            yield digests, counts

    @property
    def divisor(self) -> int:
        return self.count // _PART + 1

    def part(self, number: int, divisor: int) -> NDArray[np.uint64]:
        """Those that leave `number` when divided by `divisor`."""
        self._flush()
        self._file.seek(0)
        found = [np.empty(0, np.uint64)]
        while chunk := self._file.read(2**23):
            digests = np.frombuffer(chunk, np.uint64)
            found.append(digests[digests % np.uint64(divisor) == number])
        self._file.seek(0, 2)
        return np.concatenate(found)

    def summary(self, most: int) -> tuple[int, dict[int, int]]:
        """How many are distinct, and the `most` frequent of those that are there several times."""
        distinct, repeated = 0, list[tuple[int, int]]()
        for digests, counts in self.parts():
            distinct += len(digests)
            top = np.argsort(-counts, kind="stable")[:most]
            repeated += [(int(digests[at]), int(counts[at])) for at in top if counts[at] > 1]
        return distinct, dict(sorted(repeated, key=lambda one: -one[1])[:most])

    def also_in(self, other: Digests) -> int:
        """How many distinct ones are in both."""
        divisor = max(self.divisor, other.divisor)
        return sum(
            len(np.intersect1d(self.part(number, divisor), other.part(number, divisor))) for number in range(divisor)
        )

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._waiting.tobytes())
        self._waiting = array("Q")


class Repeated(Generic[T]):
    """What contents that come again look like: lossy counting, so what is frequent is never dropped."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, T]] = {}

    def add(self, digest: int, look: T) -> None:
        count, first = self._seen.get(digest, (0, look))
        self._seen[digest] = (count + 1, first)
        if len(self._seen) > 2 * NAMES:
            self._seen = dict(sorted(self._seen.items(), key=lambda item: -item[1][0])[:NAMES])

    def of(self, digest: int) -> T | None:
        """None where it is not known any more."""
        return self._seen[digest][1] if digest in self._seen else None
