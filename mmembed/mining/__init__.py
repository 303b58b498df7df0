"""Mining: from what a search found for each query to its hard negatives. Arrays in, arrays out, no model, no files.

    candidates = retrieve(queries, corpus, positives, depth=50)  # retrieval.py; or Candidates.of(any scores)
    rules = [MINERS.build(one) for one in ({"type": "percent_of_positive"}, "random")]
    rows = mine(candidates, rules, count=7, seed=0)  # (Q, 7) rows of the corpus, -1 where too few are left

A rule is one small file and of one role: a `filter` says which candidates may be chosen, a `pick` which of them are
preferred (best score first where there is none), a `fill` where more come from when too few are left, a `cluster`
groups queries whose positives are each other's negatives (`Miner.groups`). Filters see all candidates, so their order
does not matter. A fill brings nothing back that a filter keeps out by its score (`fillable`): a query has fewer then.

Known positives, their copies, and copies of candidates are gone before any rule sees them. Random rules draw from
(seed, key of the query, row), never from a place in an array: what is chosen for a query does not depend on the queries
beside it, so shards can be mined in any order, again, or on another machine.

Cost: a few passes over (Q, C) arrays; 20,000 queries with 50 candidates take .1 to .3 s.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import ConfigError, MmembedError
from mmembed.registry import Registry

Role = Literal["filter", "pick", "fill", "cluster"]
Field = Literal["positive_scores", "clusters", "surface", "owners"]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """What was found for Q queries: C candidates each, best first, without known positives and copies. See `of`.

    rows: (Q, C) rows of the corpus, -1 behind the last.
    scores: (Q, C) float32, -inf behind the last.
    positives: (Q, P) rows of the known positives, -1 where a query has fewer.
    keys: (Q,) uint64, what a query's random draws depend on.
    corpus: N, the rows that there are.
    positive_scores: (Q, P) float32, NaN where there is no positive.
    contents: (N,) what is equal for rows of equal content.
    clusters: (N,) the cluster of each row.
    surface: (Q, C) float32 in [0, 1], how alike query and candidate look (DebCSE).
    owners: (Q, C) float32, how similar the query is to another one whose positive the candidate is; -inf where it is
        nobody's. See `mmembed.mining.owner_similarity.with_owners`.
    taught: whether the scores are a teacher's, so that they say nothing of rows that the search did not find.
    barred: (Q, B) rows that are not to be chosen, and about which nothing else is said: negatives that the query has
        already, documents that show its own picture; -1 where a query has fewer.
    """

    rows: Rows
    scores: Floats
    positives: Rows
    keys: NDArray[np.uint64]
    corpus: int
    positive_scores: Floats | None = None
    contents: NDArray[np.int64] | None = None
    clusters: NDArray[np.int64] | None = None
    surface: Floats | None = None
    barred: Rows | None = None
    owners: Floats | None = None
    taught: bool = False

    @classmethod
    def of(
        cls,
        rows: Rows,
        scores: Floats,
        positives: Rows,
        corpus: int,
        *,
        keys: NDArray[np.uint64] | None = None,
        positive_scores: Floats | None = None,
        contents: NDArray[np.int64] | None = None,
        clusters: NDArray[np.int64] | None = None,
        surface: Floats | None = None,
        barred: Rows | None = None,
    ) -> Candidates:
        """Orders by falling score, ties by the smaller row; drops known positives, barred rows, copies of either, and
        copies.

        Args:
            rows, scores, positives, corpus, positive_scores, clusters, surface, barred: as above, candidates in any
                order, -1 anywhere.
            keys: numbers that are a query's own, for example hashes of its content; 0 .. Q - 1 where None.
            contents: numbers, equal where the content of two rows is (hashes, say); None: no two rows are.

        Raises:
            MmembedError: shapes that differ, a row that the corpus does not have, a score that is not finite.
        """
        rows, scores, positives = np.asarray(rows, np.int64), np.asarray(scores, np.float32), np.asarray(positives)
        count = len(rows)
        barred = np.full((count, 0), -1, np.int64) if barred is None else np.asarray(barred, np.int64)
        shapes: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]]
        shapes = {"rows": (rows, rows.shape), "scores": (scores, rows.shape), "surface": (surface, rows.shape)}
        shapes |= {"positives": (positives, (count, positives.shape[-1])), "keys": (keys, (count,))}
        shapes |= {"positive_scores": (positive_scores, positives.shape), "barred": (barred, (count, barred.shape[-1]))}
        shapes |= {"contents": (contents, (corpus,)), "clusters": (clusters, (corpus,))}
        for name, (array, shape) in shapes.items():
            if array is not None and (array.shape != shape or rows.ndim != 2 or positives.ndim != 2):
                raise MmembedError(f"mining: {name} of shape {array.shape}; it should be {shape}")
        for name, given in (("rows", rows), ("positives", positives), ("barred", barred)):
            if given.size and not -1 <= given.min() <= given.max() < corpus:
                raise MmembedError(f"mining: {name} {given.min()} to {given.max()} of a corpus of {corpus}")
        _check_finite("a candidate", scores, rows)
        if positive_scores is not None:
            _check_finite("a positive", positive_scores, positives)
        if surface is not None:
            _check_finite("the surface of a candidate", surface, rows)
        order = np.lexsort((rows, np.where(rows >= 0, -scores, np.inf)), axis=1)  # (Q, C)
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        number = np.arange(corpus) if contents is None else np.unique(contents, return_inverse=True)[1]  # (N,)
        numbers = np.where(rows >= 0, number[rows], -1)  # (Q, C)
        valid = (rows >= 0) & _first_of_equal(numbers)
        for gone in np.concatenate([positives, barred], axis=1).T:  # (Q,)
            some = np.flatnonzero(gone >= 0)
            valid[some] &= numbers[some] != number[gone[some], None]
        front = np.argsort(~valid, axis=1, kind="stable")  # (Q, C)
        rows = np.take_along_axis(np.where(valid, rows, -1), front, axis=1)
        scores = np.take_along_axis(np.where(valid, scores, np.float32(-np.inf)), front, axis=1)
        if surface is not None:
            surface = np.take_along_axis(np.take_along_axis(np.asarray(surface, np.float32), order, 1), front, axis=1)
        keys = np.arange(count, dtype=np.uint64) if keys is None else np.asarray(keys, np.uint64)
        held = None if positive_scores is None else np.where(positives >= 0, positive_scores, np.nan).astype(np.float32)
        positives = positives.astype(np.int64)
        return cls(rows, scores, positives, keys, corpus, held, contents, clusters, surface, barred)

    def rescored(self, scores: Floats, positive_scores: Floats | None = None) -> Candidates:
        """The same candidates with a teacher's scores (Q, C), in their order; of the positives (Q, P), too."""
        found = Candidates.of(
            self.rows, scores, self.positives, self.corpus,
            keys=self.keys, positive_scores=positive_scores, contents=self.contents, clusters=self.clusters,
            surface=self.surface, barred=self.barred,
        )  # fmt: skip
        return replace(found, taught=True)

    def first(self, depth: int) -> Candidates:
        """The best `depth` of each query."""
        surface, owners = (None if one is None else one[:, :depth] for one in (self.surface, self.owners))
        return replace(self, rows=self.rows[:, :depth], scores=self.scores[:, :depth], surface=surface, owners=owners)

    @property
    def valid(self) -> Mask:
        """(Q, C): where there is a candidate."""
        return self.rows >= 0

    def least_positive(self, rule: str) -> NDArray[np.float64]:
        """(Q, 1) the lowest score of a query's positives: what is below it is below all of them.

        Raises MmembedError where a query has no positive.
        """
        assert self.positive_scores is not None, f"{rule} reads positive_scores"
        scores = np.where(self.positives >= 0, self.positive_scores, np.inf).astype(np.float64)
        least = scores.min(axis=1, keepdims=True, initial=np.inf)
        if np.isinf(least).any():
            query = int(np.flatnonzero(np.isinf(least))[0])
            raise MmembedError(
                f"mining.{rule}: query {query} has no known positive to compare with; give it one, or leave it out"
            )
        return least

    def content(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """What is equal for rows of equal content: (n,) rows -> (n,)."""
        return rows if self.contents is None else self.contents[rows]


class Miner:
    """Base of the rules.

    role: which of the methods below it has; see the module.
    reads: what it needs of the candidates beyond rows and scores.
    """

    name: ClassVar[str]
    role: ClassVar[Role]
    reads: ClassVar[frozenset[Field]] = frozenset()

    def keep(self, candidates: Candidates) -> Mask:
        """Of a filter: (Q, C), which candidates may be chosen."""
        raise NotImplementedError

    def ceiling(self, candidates: Candidates) -> NDArray[np.float64]:
        """Of a filter: (Q, 1), the score above which it keeps nothing; infinite where it has no such bound."""
        return np.full((len(candidates.rows), 1), np.inf)

    def prefer(self, candidates: Candidates, kept: Mask, seed: int) -> NDArray[np.float64]:
        """Of a pick: (Q, C), higher is chosen first, equal ones by their rank; -inf is not chosen."""
        raise NotImplementedError

    def fill(self, candidates: Candidates, chosen: Rows, open_to: Mask, seed: int) -> Rows:
        """Of a fill: (Q, count) with rows of the corpus in place of -1, where there are some.

        Args:
            open_to: (Q,) the queries that are filled, see `fillable`.
        """
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Of a cluster: candidates a query that `groups` looks at. `retrieve` them with `spare=False`."""
        raise NotImplementedError

    def groups(self, candidates: Candidates, queries: NDArray[np.float32], apart: NDArray[np.int64], seed: int) -> Rows:
        """Of a cluster: (Q,) the number of each query's group, -1 of one that stands alone.

        Args:
            candidates: of a corpus of positives. queries: (Q, E) unit vectors.
            apart: (Q,) numbers; two queries of the same number may not stand in one group.
            seed: of the draws.
        """
        raise NotImplementedError


class Owners:
    """Whose positive a row of the corpus is, and which queries are taken. The first positive of a query counts.

    Args:
        candidates: of a corpus of positives.
        order: (Q,) the order in which the owners of one positive are taken.
    """

    def __init__(self, candidates: Candidates, order: NDArray[np.int64]) -> None:
        self.positive: list[int] = candidates.positives[:, 0].tolist()
        self.taken = [False] * len(self.positive)
        self._of: dict[int, list[int]] = {}
        for query in reversed(order.tolist()):
            self._of.setdefault(self.positive[query], []).append(query)

    def free(self, row: int, apart: NDArray[np.int64], held: set[int]) -> int:
        """The next owner of a positive; -1 where there is none, or where its number of `apart` is held (owners of one
        positive share theirs)."""
        owners = self._of.get(row, []) if row >= 0 else []
        while owners and self.taken[owners[-1]]:
            owners.pop()
        return owners[-1] if owners and int(apart[owners[-1]]) not in held else -1

    def take(self, query: int) -> None:
        self.taken[query] = True


MINERS: Registry[Miner] = Registry("mmembed.mining", Miner)


def mine(candidates: Candidates, rules: Sequence[Miner], count: int, seed: int = 0) -> Rows:
    """The negatives of each query.

    Args:
        rules: any filters, at most one pick and one fill.
        count: negatives a query.
        seed: of the rules that draw.

    Returns:
        (Q, count) rows of the corpus in the order of preference; -1 where too few were left.

    Raises:
        MmembedError: count < 1, or a corpus with fewer than `count` rows.
        ConfigError: rules that do not go together, or that need what the candidates do not have.
    """
    if count < 1:
        raise MmembedError(f"mine: {count} negatives a query; ask for 1 at least")
    if candidates.corpus < count:
        raise MmembedError(f"mine: {count} negatives of a corpus of {candidates.corpus}; ask for fewer")
    given = {name for name in get_args(Field) if vars(candidates)[name] is not None}
    by_role = check_rules(rules, given)
    kept = candidates.valid
    for rule in by_role["filter"]:
        kept = kept & rule.keep(candidates)
    preference = by_role["pick"][0].prefer(candidates, kept, seed) if by_role["pick"] else np.zeros(kept.shape)
    kept = kept & (preference > -np.inf)
    order = np.argsort(np.where(kept, -preference, np.inf), axis=1, kind="stable")[:, :count]  # (Q, <= count)
    there = np.take_along_axis(kept, order, axis=1)
    chosen = np.full((len(kept), count), -1, np.int64)
    chosen[:, : order.shape[1]] = np.where(there, np.take_along_axis(candidates.rows, order, axis=1), -1)
    if not by_role["fill"]:
        return chosen
    return by_role["fill"][0].fill(candidates, chosen, fillable(candidates, by_role["filter"]), seed)


def fillable(candidates: Candidates, filters: Sequence[Miner]) -> Mask:
    """Which queries may get rows that the search did not find.

    An exact search leaves nothing that scores above the last candidate, so where that is below the ceilings of all
    filters (`Miner.ceiling`), so is every other row. A teacher's scores bound no row that it has not seen; there all
    candidates have to be below, which is a sign, not a bound. A query without candidates is filled where no filter has
    a ceiling.

    Returns:
        (Q,) of any filters.
    """
    if not filters:
        return np.ones(len(candidates.rows), bool)
    ceiling = np.min([rule.ceiling(candidates) for rule in filters], axis=0)[:, 0]  # (Q,)
    scores = np.where(candidates.valid, candidates.scores, np.nan)
    found = np.flatnonzero(candidates.valid.any(axis=1))
    decides = np.full(len(candidates.rows), np.inf)
    decides[found] = (np.nanmax if candidates.taught else np.nanmin)(scores[found], axis=1)
    may: Mask = decides <= ceiling
    return may


def _first_of_equal(numbers: NDArray[np.int64]) -> Mask:
    """(Q, C): whether none before it in its row is equal."""
    first = np.ones(numbers.shape, bool)
    ordered = np.sort(numbers, axis=1)
    for query in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        first[query] = False
        first[query, np.unique(numbers[query], return_index=True)[1]] = True
    return first


def uniform(seed: int, keys: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in (0, 1) that depend on nothing but seed, key and row: (Q,), (Q, C) -> (Q, C). (splitmix64)"""
    with np.errstate(over="ignore"):
        state = _mixed(_mixed(keys.astype(np.uint64)) + np.uint64(seed))  # (Q,)
        bits = _mixed(_mixed(state)[:, None] + rows.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))  # (Q, C)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def check_rules(rules: Sequence[Miner], given: Collection[str], where: str = "mining") -> dict[Role, list[Miner]]:
    """Rules by their role.

    Args:
        given: which of `Field` the candidates have.
        where: the rules stand, for messages.

    Raises:
        ConfigError: rules that do not go together, make groups, or read what the candidates do not have.
    """
    found: dict[Role, list[Miner]] = {"filter": [], "pick": [], "fill": [], "cluster": []}
    for rule in rules:
        found[rule.role].append(rule)
        for field in sorted(rule.reads):
            if field not in given:
                raise ConfigError(f"{where}.{rule.name}: reads {field}, which the candidates do not have")
    if found["cluster"]:
        raise ConfigError(
            f"{where}.{found['cluster'][0].name}: makes groups of pairs, not negatives; write it as data.batch_order, "
            "or call its groups()"
        )
    alone: tuple[Role, ...] = ("pick", "fill")
    for role in alone:
        if len(found[role]) > 1:
            names = " and ".join(rule.name for rule in found[role])
            raise ConfigError(f"{where}: {names} both {role} the negatives; keep one")
    return found


def _check_finite(what: str, scores: Floats, rows: Rows) -> None:
    broken = (rows >= 0) & ~np.isfinite(scores)
    if broken.any():
        query, column = np.argwhere(broken)[0]
        raise MmembedError(
            f"mining: the score of {what} of query {query} (row {rows[query, column]}) is {scores[query, column]}; "
            "look for NaN in its vectors"
        )
