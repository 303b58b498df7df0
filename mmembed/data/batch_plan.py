"""Which rows make up which batch: a pure function of sizes, weights, seed, epoch, world size and rank.

A batch holds one source only (negatives of another task teach a shortcut: telling the tasks apart), the same on all
ranks, and the ranks take disjoint slices of it. Nothing is drawn while training, so a resumed run or another process
gets the same batches by asking again. A streamed source is dealt by positions (`mmembed.data.streaming`).

A source is an endless stream: passes over its rows, each pass in a new order and cut into whole batches. A source that
is drawn rarely goes on in the next epoch where it stopped; one that is drawn often repeats. Rows that share a query or
a positive would be false negatives of each other, so they are dealt out like cards: all rows in random order but those
of a group together, row i into batch i modulo the number of batches. A group meets itself only when it has more rows
than a pass has batches.

Where rows are clustered (`mmembed.mining`: hard in-batch negatives), a pass deals whole clusters in a new random order,
the largest first, so that those of a size that divides a batch are not cut; what a pass leaves over are whole clusters
but one. Rows of a group that two clusters bring into one batch are exchanged with rows of other batches.

Costs, a row: 4 bytes for its group, and 4 for the order of the pass that is being drawn from; 2 us to find the groups
once, 0.5 us for an order, 1 us for one of clusters (`python -m benchmarks.plan_scale`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch.utils.data

from mmembed.errors import ConfigError

_ROUNDS = 32  # links followed from row to row; longer chains are cut, they are no harm worth more rounds


Draw = tuple[int, int, int]  # (source, row, visit): how many passes over the source came before


class BatchPlan(torch.utils.data.Sampler[list[Draw]]):
    """Yields this rank's [(source, row, visit), ...] of each step.

    Args:
        sizes: rows of each source; None of a stream, whose rows are positions of an endless sequence.
        weights: share of batches of each source (see `mixing_weights`); default: each source once, whole batches of it.
        batch_size: rows a rank and step; one number, or one a source.
        seed: of all orders.
        world_size, rank: processes that train together, and which one this is.
        keys: a source's (N, 2) integers from `RecordDataset.keys`; rows that share one do not meet in a batch where
            avoidable. None: no rows share anything.
        names: of the sources, for messages.
        batches: of an epoch; needed where a source is a stream.
        clusters: a source's (N,) numbers of the clusters that stay together in a batch, -1 of a row that is in none.
            None: none are.
        round_robin: one source after the other in the order given, each epoch from the first on; weights must be equal.
            Else sources come in random order.

    Without `batches` an epoch has as many batches as whole global batches fit into the sources. They are shared out by
    weight; each source gets at least one. The length is the same on all ranks.

    Raises:
        ConfigError: no sources, a source with fewer rows than one global batch, weights that do not fit.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        weights: Sequence[float] | None = None,
        batch_size: int | Sequence[int] = 32,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        keys: Sequence[np.ndarray | None] | None = None,
        names: Sequence[str] | None = None,
        batches: int | None = None,
        round_robin: bool = False,
        clusters: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self.sizes, self.seed, self.round_robin = tuple(sizes), seed, round_robin
        self.batch_sizes = (batch_size,) * len(self.sizes) if isinstance(batch_size, int) else tuple(batch_size)
        self.world_size, self.rank, self.epoch = world_size, rank, 0
        keys = [None] * len(self.sizes) if keys is None else keys
        self._check(names or [f"source {i}" for i in range(len(self.sizes))], keys)
        self._passes = [  # in batches
            None if size is None else size // self.batch_rows(source) for source, size in enumerate(self.sizes)
        ]
        known = [number for number in self._passes if number is not None]
        if len(known) < len(self.sizes) and (batches is None or weights is None):
            raise ConfigError("batch plan: a stream has no length; give weights and the batches of an epoch")
        shares = known if weights is None else tuple(weights)
        if round_robin and len(set(shares)) > 1:
            raise ConfigError(f"batch plan: round robin with weights {list(shares)}; it gives all sources the same")
        if len(shares) != len(self.sizes) or min(shares) <= 0:
            raise ConfigError(
                f"batch plan: weights {list(shares)} for {len(self.sizes)} sources; give each one above 0"
            )
        total = sum(known) if batches is None else batches
        self._counts = _share_out(total, shares)  # batches of each source in an epoch
        self._groups = [None if item is None else linked_rows(item) for item in keys]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self.cluster([None] * len(self.sizes) if clusters is None else clusters)

    def cluster(self, clusters: Sequence[np.ndarray | None]) -> None:
        """Gives the sources other clusters, from the next batch that is asked for on."""
        for source, (size, of) in enumerate(zip(self.sizes, clusters, strict=True)):
            if of is not None and len(of) != size:
                raise ConfigError(f"batch plan: source {source} has {size} rows, {len(of)} of them in clusters")
        self._clusters = tuple(clusters)
        self._orders.clear()

    def batch_rows(self, source: int) -> int:
        """Rows of a batch of a source, of all ranks together."""
        return self.batch_sizes[source] * self.world_size

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
        if self.round_robin:
            order = np.arange(len(self)) % len(self.sizes)  # counts differ by one at most, the first have more
        else:
            order = np.repeat(np.arange(len(self.sizes)), self._counts)
            self._generator(epoch, purpose=0).shuffle(order)
        drawn = [epoch * count for count in self._counts]
        for source in order.tolist():
            size, whole = self.batch_sizes[source], self.batch_rows(source)
            mine = slice(self.rank * size, (self.rank + 1) * size)
            passes, number = self._passes[source], drawn[source]
            drawn[source] += 1
            if passes is None:
                rows = range(number * whole, (number + 1) * whole)
                yield [(source, row, 0) for row in rows[mine]]
                continue
            visit, place = divmod(number, passes)
            yield [(source, row, visit) for row in self._batch(source, visit, place)[mine].tolist()]

    def _batch(self, source: int, number: int, place: int) -> np.ndarray:
        """The rows of all ranks of batch `place` of pass `number` over a source."""
        if self._orders.get(source, (-1,))[0] != number:
            self._orders[source] = (number, self._order(source, number))
        order: np.ndarray = self._orders[source][1][place]
        return order

    def _order(self, source: int, number: int) -> np.ndarray:
        """(batches of a pass, global batch size) rows."""
        generator = self._generator(source, number, purpose=1)
        batches, size = self._passes[source], self.sizes[source]
        assert batches is not None and size is not None, "a stream has no order"
        whole, groups, clusters = self.batch_rows(source), self._groups[source], self._clusters[source]
        if clusters is not None:
            return _whole_clusters(generator, clusters, groups, batches, whole)
        order = _permutation(generator, size)[: batches * whole]
        if groups is not None:
            place = _permutation(generator, int(groups.max()) + 1)  # of each group in the deck
            order = order[np.argsort(place[groups[order]], kind="stable")]
        return order.reshape(whole, batches).T  # row i into batch i modulo batches

    def _generator(self, *numbers: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, *numbers))

    def _check(self, names: Sequence[str], keys: Sequence[np.ndarray | None]) -> None:
        if not self.sizes:
            raise ConfigError("batch plan: there is no source; add one to data.train")
        if len(self.batch_sizes) != len(self.sizes) or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch plan: batch sizes {list(self.batch_sizes)} for {len(self.sizes)} sources")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"batch plan: rank {self.rank} of {self.world_size}")
        for source, (name, size) in enumerate(zip(names, self.sizes, strict=True)):
            if size is not None and size < self.batch_rows(source):
                raise ConfigError(
                    f"data source '{name}' has {size} rows, one batch takes {self.batch_rows(source)} "
                    f"({self.world_size} processes x {self.batch_sizes[source]}); lower per_device_train_batch_size "
                    "(or the source's batch_size) or use fewer processes, or remove the source"
                )
        for name, size, of in zip(names, self.sizes, keys, strict=True):
            if of is not None and len(of) != size:
                raise ConfigError(f"data source '{name}' has {size} rows and {len(of)} keys")


def _whole_clusters(
    generator: np.random.Generator, clusters: np.ndarray, groups: np.ndarray | None, batches: int, whole: int
) -> np.ndarray:
    """(batches, whole) rows: clusters in a random order, the largest first."""
    alone = clusters < 0
    numbers = np.where(alone, clusters.max(initial=-1) + 1 + np.cumsum(alone), clusters)  # (N,)
    _, numbers, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    place = _permutation(generator, len(sizes))
    order = np.lexsort((place[numbers], -sizes[numbers]))
    kept = np.ones(len(sizes), dtype=bool)
    too_many = len(clusters) - batches * whole
    for cluster in np.argsort(place).tolist():
        if sizes[cluster] <= too_many:
            kept[cluster] = False
            too_many -= sizes[cluster]
        if not too_many:
            break
    dealt: np.ndarray = order[kept[numbers[order]]][: batches * whole].astype(np.int32).reshape(batches, whole)
    if groups is not None:
        _part(dealt, groups, generator)
    shuffled: np.ndarray = dealt[generator.permutation(batches)]
    return shuffled


def _part(order: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> None:
    """Exchanges rows between batches until no group meets itself that has no more rows than there are batches.

    A row that meets its group goes to a batch without it, for one whose group the row's batch lacks; where there is no
    such one, for one that meets its own group there. Either way fewer rows meet than before.
    """
    of = groups[order]  # (batches, whole)
    ordered = np.sort(of, axis=1)
    met = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)).tolist()
    if not met:
        return
    holders: dict[int, Counter[int]] = defaultdict(Counter)  # group -> batch -> rows
    several = np.bincount(of.ravel()) > 1
    for batch, column in np.argwhere(several[of]).tolist():
        holders[int(of[batch, column])][batch] += 1

    def put(batch: int, column: int, row: int) -> None:
        before, after = int(of[batch, column]), int(groups[row])
        for group, more in ((before, -1), (after, 1)):
            if several[group]:
                holders[group][batch] += more
                if not holders[group][batch]:
                    del holders[group][batch]
        order[batch, column], of[batch, column] = row, after

    for batch in met:
        while True:
            column = next(
                (
                    place
                    for place, group in enumerate(of[batch].tolist())
                    if several[group] and holders[group][batch] > 1 and len(holders[group]) < len(order)
                ),
                -1,
            )
            if column < 0:
                break
            without, start = holders[int(of[batch, column])], int(generator.integers(len(order)))
            other = next(
                one % len(order) for one in range(start, start + len(order)) if one % len(order) not in without
            )
            mine = set(of[batch].tolist())
            theirs = of[other].tolist()
            swap = next((place for place, group in enumerate(theirs) if group not in mine), -1)
            if swap < 0:
                swap = next(place for place, group in enumerate(theirs) if theirs.count(group) > 1)
            row, back = int(order[batch, column]), int(order[other, swap])
            put(batch, column, back)
            put(other, swap, row)


def _permutation(generator: np.random.Generator, count: int) -> np.ndarray:
    """Of row numbers, in 4 bytes each."""
    return generator.permutation(count).astype(np.int32)


def _share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers above 0 in proportion to `shares`, of sum `total` where that is possible: largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts


def linked_rows(keys: np.ndarray) -> np.ndarray:
    """(N,) int32 numbers of the groups of rows that are linked by equal keys in a column, directly or through others.

    Rows take the smallest row number that any row of equal key has, column by column, until nothing changes; following
    that row's own number doubles the length of the chains that a round closes. Only rows that share a key take part.
    """
    links = [_shared(column) for column in keys.T]
    smallest = np.arange(len(keys), dtype=np.int32)
    for _ in range(_ROUNDS):
        before = smallest.copy()
        for rows, starts in links:
            if len(rows):
                found = np.minimum.reduceat(smallest[rows], starts)
                smallest[rows] = np.repeat(found, np.diff(starts, append=len(rows)))
        smallest = smallest[smallest]
        if np.array_equal(before, smallest):
            break
    return _numbered(smallest, keys[:, 0])


def _shared(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key another row has too, equal ones side by side, and where each run of equal ones starts."""
    order = np.argsort(column).astype(np.int32)
    values = column[order]
    same = values[1:] == values[:-1]
    shared = np.zeros(len(column), dtype=bool)
    shared[1:] = same
    shared[:-1] |= same
    rows, values = order[shared], values[shared]
    return rows, np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(rows) else rows


def _numbered(smallest: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Groups from 0 on in the order of the smallest key in them, which is the order of plans made so far."""
    order = np.argsort(keys).astype(np.int32)
    values = keys[order]
    rank = np.empty(len(keys), dtype=np.int32)
    rank[order] = np.concatenate([[0], np.cumsum(values[1:] != values[:-1], dtype=np.int32)])
    least = rank.copy()
    np.minimum.at(least, smallest, rank)
    used = np.zeros(len(keys), dtype=bool)
    used[least[smallest]] = True
    return (np.cumsum(used, dtype=np.int32) - 1)[least[smallest]]
