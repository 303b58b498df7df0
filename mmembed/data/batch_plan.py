"""Which rows make up which batch: a pure function of sizes, weights, seed, epoch, world size and rank.

A batch holds one source only (negatives of another task teach a shortcut: telling the tasks apart), the same on all
ranks, and the ranks take disjoint slices of it. Nothing is drawn while training, so a resumed run or another process
gets the same batches by asking again.

A source is an endless stream: passes over its rows, each pass in a new order and cut into whole batches. A source that
is drawn rarely goes on in the next epoch where it stopped; one that is drawn often repeats. Rows that share a query or
a positive would be false negatives of each other, so they are dealt out like cards: all rows in random order but those
of a group together, row i into batch i modulo the number of batches. A group meets itself only when it has more rows
than a pass has batches.

Costs: the order of one pass a source, 8 bytes and 0.2 us a row, while the source is being drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch.utils.data

from mmembed.errors import ConfigError

_ROUNDS = 32  # links followed from row to row; longer chains are cut, they are no harm worth more rounds


Draw = tuple[int, int, int]  # (source, row, visit): how many passes over the source came before


class BatchPlan(torch.utils.data.Sampler[list[Draw]]):
    """Yields this rank's [(source, row, visit), ...] of each step.

    Args:
        sizes: rows of each source.
        weights: share of batches of each source (see `mixing_weights`); default: each source once, whole batches of it.
        batch_size: rows a rank and step.
        seed: of all orders.
        world_size, rank: processes that train together, and which one this is.
        keys: a source's (N, 2) integers from `RecordDataset.keys`; rows that share one do not meet in a batch where
            avoidable. None: no rows share anything.
        names: of the sources, for messages.

    An epoch has as many batches as whole global batches fit into the sources, shared out by weight; each source gets at
    least one. Its length is the same on all ranks.

    Raises:
        ConfigError: no sources, a source with fewer rows than one global batch, weights that do not fit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        batch_size: int = 32,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        keys: Sequence[np.ndarray | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.world_size, self.rank, self.epoch = world_size, rank, 0
        self.keys = (None,) * len(self.sizes) if keys is None else tuple(keys)
        self._check(names or [f"source {i}" for i in range(len(self.sizes))])
        self._passes = [size // self.global_batch_size for size in self.sizes]  # batches of one pass
        shares = self._passes if weights is None else tuple(weights)
        if len(shares) != len(self.sizes) or min(shares) <= 0:
            raise ConfigError(
                f"batch plan: weights {list(shares)} for {len(self.sizes)} sources; give each one above 0"
            )
        self._counts = _share_out(sum(self._passes), shares)  # batches of each source in an epoch
        self._groups = [None if item is None else _groups(item) for item in self.keys]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def global_batch_size(self) -> int:
        """Rows of all ranks together."""
        return self.batch_size * self.world_size

    @property
    def batches_per_source(self) -> tuple[int, ...]:
        """How many batches of an epoch come from each source."""
        return tuple(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        order = np.repeat(np.arange(len(self.sizes)), self._counts)
        self._generator(epoch, purpose=0).shuffle(order)
        drawn = [epoch * count for count in self._counts]
        for source in order.tolist():
            visit, place = divmod(drawn[source], self._passes[source])
            rows = self._batch(source, visit, place)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            drawn[source] += 1
            yield [(source, row, visit) for row in rows.tolist()]

    def _batch(self, source: int, number: int, place: int) -> np.ndarray:
        """The rows of all ranks of batch `place` of pass `number` over a source."""
        if self._orders.get(source, (-1,))[0] != number:
            self._orders[source] = (number, self._order(source, number))
        order: np.ndarray = self._orders[source][1][place]
        return order

    def _order(self, source: int, number: int) -> np.ndarray:
        """(batches of a pass, global batch size) rows."""
        generator = self._generator(source, number, purpose=1)
        batches = self._passes[source]
        order = generator.permutation(self.sizes[source])[: batches * self.global_batch_size]
        groups = self._groups[source]
        if groups is not None:
            place = generator.permutation(int(groups.max()) + 1)  # of each group in the deck
            order = order[np.argsort(place[groups[order]], kind="stable")]
        return order.reshape(self.global_batch_size, batches).T  # row i into batch i modulo batches

    def _generator(self, *numbers: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, *numbers))

    def _check(self, names: Sequence[str]) -> None:
        if not self.sizes:
            raise ConfigError("batch plan: there is no source; add one to data.train")
        if not 0 <= self.rank < self.world_size or self.batch_size < 1:
            raise ConfigError(f"batch plan: rank {self.rank} of {self.world_size}, batch size {self.batch_size}")
        for name, size in zip(names, self.sizes, strict=True):
            if size < self.global_batch_size:
                raise ConfigError(
                    f"data source '{name}' has {size} rows, one batch takes {self.global_batch_size} "
                    f"({self.world_size} processes x {self.batch_size}); lower per_device_train_batch_size or use "
                    "fewer processes, or remove the source"
                )
        for name, size, keys in zip(names, self.sizes, self.keys, strict=True):
            if keys is not None and len(keys) != size:
                raise ConfigError(f"data source '{name}' has {size} rows and {len(keys)} keys")


def _share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers above 0 in proportion to `shares`, of sum `total` where that is possible: largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts


def _groups(keys: np.ndarray) -> np.ndarray:
    """(N,) numbers of the groups of rows that are linked by equal keys in a column, directly or through others."""
    columns = [np.unique(column, return_inverse=True)[1] for column in keys.T]
    groups = columns[0]
    for _ in range(_ROUNDS):
        before = groups
        for column in columns:
            smallest = np.full(len(keys), len(keys))
            np.minimum.at(smallest, column, groups)
            groups = smallest[column]
        if np.array_equal(before, groups):
            break
    return np.unique(groups, return_inverse=True)[1]
