"""What every rule of mining promises, asked of every class that is registered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import ConfigError
from mmembed.mining import MINERS, Candidates, Miner, mine, uniform

OPTIONS = {
    "threshold": {"most": 0.5, "least": -0.5},
    "rank_window": {"first": 1, "last": 6},
    "cluster_diverse": {"most": 2},
    "similar": {"size": 4, "neighbours": 6},
    "b3": {"size": 4, "skip": 1, "neighbours": 6},
    "saha": {"negatives": 3},
}
METHODS = {"filter": "keep", "pick": "prefer", "fill": "fill", "cluster": "groups"}
RULES = {name: MINERS.build({"type": name, **OPTIONS.get(name, {})}) for name in MINERS.classes()}
CHOOSING = [name for name, rule in RULES.items() if rule.role != "cluster"]


def drawn(seed: int, queries: int = 6, found: int = 12, corpus: int = 30, contents: int | None = None) -> Candidates:
    """Candidates that any rule can read; some queries have fewer, all have one to three positives."""
    random = np.random.default_rng(seed)
    rows = np.argsort(random.random((queries, corpus)), axis=1)[:, :found]
    rows[random.random(rows.shape) < 0.1] = -1
    positives = np.argsort(random.random((queries, corpus)), axis=1)[:, :3]
    positives[:, 1:][random.random((queries, 2)) < 0.5] = -1
    scores = random.integers(-9, 10, rows.shape).astype(np.float32) / 10  # with ties
    found = Candidates.of(
        rows,
        scores,
        positives,
        corpus,
        keys=random.integers(0, 2**60, queries).astype(np.uint64),
        positive_scores=random.uniform(-0.2, 1, positives.shape).astype(np.float32),
        contents=None if contents is None else random.integers(0, contents, corpus),
        clusters=random.integers(0, 4, corpus),
        surface=random.random(rows.shape).astype(np.float32),
    )
    return owned(found)


def owned(candidates: Candidates) -> Candidates:
    """With owners, of most candidates, that follow from query and row."""
    drawn = uniform(9, candidates.keys, candidates.rows).astype(np.float32)
    return replace(candidates, owners=np.where(candidates.valid & (drawn > 0.3), drawn, -np.inf))


def some(candidates: Candidates, order: np.ndarray) -> Candidates:
    """Some of the queries."""
    per_query = {
        name: vars(candidates)[name][order] for name in ("rows", "scores", "positives", "keys", "surface", "owners")
    }
    return replace(candidates, positive_scores=candidates.positive_scores[order], **per_query)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_the_method_of_its_role(name: str) -> None:
    rule = RULES[name]
    written = {method for method in METHODS.values() if method in vars(type(rule))}
    assert written == {METHODS[rule.role]}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_asks_for_what_it_reads(name: str) -> None:
    rule, bare = RULES[name], replace(drawn(0), positive_scores=None, clusters=None, surface=None, owners=None)
    if rule.role == "cluster":
        with pytest.raises(ConfigError, match="groups of pairs, not negatives.*data.batch_order"):
            mine(drawn(0), [rule], 2)
    elif rule.reads:
        with pytest.raises(ConfigError, match=f"mining.{name}: reads {min(rule.reads)}"):
            mine(bare, [rule], 2)
    else:
        mine(bare, [rule], 2)


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 14), contents=st.sampled_from([None, 5, 20]))
def test_what_is_chosen_is_negative_new_and_no_more_than_asked(name: str, seed: int, count: int, contents) -> None:
    candidates = drawn(seed, contents=contents)
    chosen = mine(candidates, [RULES[name]], count, seed)
    assert chosen.shape == (len(candidates.rows), count)
    number = np.arange(candidates.corpus) if contents is None else candidates.contents
    for query, row in enumerate(chosen):
        taken = row[row >= 0]
        assert (row[len(taken) :] == -1).all()  # -1 at the end only
        assert len({*number[taken]}) == len(taken)
        positives = candidates.positives[query]
        assert not {*number[taken]} & {*number[positives[positives >= 0]]}
        found = candidates.rows[query][candidates.valid[query]]
        if RULES[name].role != "fill":
            assert {*taken} <= {*found}
        else:  # all candidates first, then others until there are enough, or no more
            assert list(taken[: len(found)]) == list(found[: len(taken)])
            open_contents = {*number} - {*number[positives[positives >= 0]]}
            assert len(taken) == count or len(taken) >= len(open_contents - {*number[found]})


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_neither_places_nor_neighbours_matter(name: str, seed: int, data) -> None:
    """A query's negatives are the same alone, among others, and with its candidates in any order."""
    candidates = drawn(seed)
    chosen = mine(candidates, [RULES[name]], 4, seed)
    order = np.array(data.draw(st.permutations(range(len(candidates.rows)))))[: data.draw(st.integers(1, 6))]
    np.testing.assert_array_equal(mine(some(candidates, order), [RULES[name]], 4, seed), chosen[order])
    mixed = np.array(data.draw(st.permutations(range(candidates.rows.shape[1]))))
    again = Candidates.of(
        candidates.rows[:, mixed],
        candidates.scores[:, mixed],
        candidates.positives[:, ::-1],
        candidates.corpus,
        keys=candidates.keys,
        positive_scores=candidates.positive_scores[:, ::-1],
        clusters=candidates.clusters,
        surface=candidates.surface[:, mixed],
    )
    np.testing.assert_array_equal(mine(owned(again), [RULES[name]], 4, seed), chosen)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), names=st.permutations(CHOOSING), data=st.data())
def test_the_order_of_rules_does_not_matter(seed: int, names, data) -> None:
    rules: list[Miner] = []
    for name in names:
        if RULES[name].role == "filter" or all(one.role != RULES[name].role for one in rules):
            rules.append(RULES[name])
    candidates = drawn(seed)
    chosen = mine(candidates, rules, 5, seed)
    np.testing.assert_array_equal(mine(candidates, data.draw(st.permutations(rules)), 5, seed), chosen)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.role == "cluster"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), shared=st.integers(1, 60))
def test_groups_are_no_larger_than_asked_and_hold_nothing_twice(name: str, seed: int, count: int, shared: int) -> None:
    """Of any candidates: a number each, the same when asked again, and no two of one positive in a group."""
    rule, random = RULES[name], np.random.default_rng(seed)
    positives = random.integers(0, shared, count)
    corpus = int(positives.max()) + 1
    scores = random.random((count, corpus)).astype(np.float32)
    found = np.argsort(-scores, axis=1)[:, : rule.depth]
    candidates = Candidates.of(found, np.take_along_axis(scores, found, 1), positives[:, None], corpus)
    queries = random.normal(size=(count, 5)).astype(np.float32)
    groups = rule.groups(candidates, queries, positives, seed)
    assert groups.shape == (count,) and groups.min() >= -1
    for number in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == number)
        assert len(members) <= 4
        assert len({*positives[members]}) == len(members)
    np.testing.assert_array_equal(rule.groups(candidates, queries, positives, seed), groups)
