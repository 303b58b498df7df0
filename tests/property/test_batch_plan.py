"""The batch plan: for any sources, sizes, ranks and epochs the promises of its docstring hold."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plan_scale import measure, mined_keys
from mmembed.data.batch_plan import BatchPlan, linked_rows
from mmembed.data.mixing import mixing_weights, shares
from mmembed.errors import ConfigError


@st.composite
def plans(draw):
    batch_size, world_size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    least = batch_size * world_size
    sizes = draw(st.lists(st.integers(least, least * 7), min_size=1, max_size=4))
    seed, epoch = draw(st.integers(0, 2**40)), draw(st.integers(0, 3))
    return {"sizes": sizes, "batch_size": batch_size, "seed": seed, "world_size": world_size}, epoch


def batches(arguments, epoch, **more):
    """[step][rank] -> rows."""
    ranks = []
    for rank in range(arguments["world_size"]):
        plan = BatchPlan(**arguments, **more, rank=rank)
        plan.set_epoch(epoch)
        ranks.append(list(plan))
        assert len(ranks[-1]) == len(plan)
    assert len({len(steps) for steps in ranks}) == 1
    return list(zip(*ranks, strict=True))


@given(plans())
def test_one_source_a_step_and_disjoint_full_slices(case):
    arguments, epoch = case
    for step in batches(arguments, epoch):
        rows = [row for rank in step for row in rank]
        assert len({source for source, _, _ in rows}) == 1
        assert len(set(rows)) == len(rows)
        assert all(len(rank) == arguments["batch_size"] for rank in step)
        assert all(0 <= row < arguments["sizes"][source] for source, row, _ in rows)


@given(plans())
def test_an_epoch_without_weights_is_one_pass_over_every_source(case):
    arguments, epoch = case
    seen = Counter(row for step in batches(arguments, epoch) for rank in step for row in rank)
    whole = arguments["batch_size"] * arguments["world_size"]
    for source, size in enumerate(arguments["sizes"]):
        drawn = [count for (owner, _, _), count in seen.items() if owner == source]
        assert set(drawn) == {1}
        assert len(drawn) == size // whole * whole


@given(plans(), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_weights_hold_and_a_source_goes_on_where_it_stopped(case, weights):
    arguments, _ = case
    sizes = arguments["sizes"]
    whole = arguments["batch_size"] * arguments["world_size"]
    counts = BatchPlan(**arguments, weights=weights[: len(sizes)]).batches_per_source
    total, shares = sum(size // whole for size in sizes), np.array(weights[: len(sizes)])
    for count, exact in zip(counts, total * shares / shares.sum(), strict=True):
        assert count == 1 or abs(count - exact) < 1
    drawn: list[Counter] = [Counter() for _ in sizes]
    for epoch in range(4):
        for step in batches(arguments, epoch, weights=weights[: len(sizes)]):
            for rank in step:
                for source, row, visit in rank:
                    assert visit >= drawn[source][row]  # rows left over by a pass are visited less often
                    drawn[source][row] += 1
    for count, size, rows in zip(counts, sizes, drawn, strict=True):
        passes = 4 * count / (size // whole)
        assert sum(rows.values()) == 4 * count * whole
        assert max(rows.values()) <= int(np.ceil(passes))  # no row comes again before the pass is over


@given(plans())
def test_the_plan_is_a_pure_function(case):
    arguments, epoch = case
    first = batches(arguments, epoch)
    assert first == batches(arguments, epoch)
    plan = BatchPlan(**arguments)
    list(plan)  # an epoch drawn before does not matter
    plan.set_epoch(epoch)
    assert list(plan) == list(plan) == [step[0] for step in first]


@given(plans())
def test_processes_share_one_global_batch(case):
    """The same rows at the same visit, however many processes the batch is divided over."""
    arguments, epoch = case
    one = {**arguments, "batch_size": arguments["batch_size"] * arguments["world_size"], "world_size": 1}
    shared = [[row for rank in step for row in rank] for step in batches(arguments, epoch)]
    assert shared == [step[0] for step in batches(one, epoch)]


@given(plans(), st.integers(1, 3))
def test_sources_may_have_batches_of_their_own_size(case, factor):
    """Every second source has `factor` times the rows a batch: the same rows come, however many processes share."""
    arguments, epoch = case
    sizes = [factor ** (i % 2) * size for i, size in enumerate(arguments["sizes"])]
    rows = [factor ** (i % 2) * arguments["batch_size"] for i in range(len(sizes))]
    arguments = {**arguments, "sizes": sizes, "batch_size": rows}
    seen = Counter()
    steps = batches(arguments, epoch)
    for step in steps:
        (source,) = {source for rank in step for source, _, _ in rank}
        assert all(len(rank) == rows[source] for rank in step)
        seen.update(row for rank in step for row in rank)
    assert set(seen.values()) == {1}
    world = arguments["world_size"]
    assert len(seen) == sum(size // (one * world) * one * world for size, one in zip(sizes, rows, strict=True))
    one = {**arguments, "batch_size": [one * world for one in rows], "world_size": 1}
    assert [[row for rank in step for row in rank] for step in steps] == [step[0] for step in batches(one, epoch)]


@given(plans())
def test_round_robin_takes_one_source_after_the_other(case):
    arguments, epoch = case
    count = len(arguments["sizes"])
    steps = batches(arguments, epoch, weights=[1 / count] * count, round_robin=True)
    assert [step[0][0][0] for step in steps] == [number % count for number in range(len(steps))]
    counts = BatchPlan(**arguments, weights=[1 / count] * count, round_robin=True).batches_per_source
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(steps)


@pytest.mark.parametrize(
    ("rule", "weights", "expected"),  # 100 rows in batches of 10, 300 in batches of 15: 10 and 20 batches
    [
        ("proportional", [None, None], [1 / 3, 2 / 3]),
        ("temperature", [None, None], [0.25, 0.75]),
        ("proportional", [2.0, None], [2 / 3.3333333, 1.3333333 / 3.3333333]),  # an average source fills 15 batches
        ("round_robin", [None, None], [0.5, 0.5]),
    ],
)
def test_rules_of_mixing(rule, weights, expected):
    assert shares(rule, [100, 300], [10, 15], weights, alpha=1.0) == pytest.approx(expected)


def test_seed_and_epoch_matter():
    def rows(seed, epoch):
        return batches({"sizes": [200], "batch_size": 10, "seed": seed, "world_size": 1}, epoch)

    assert rows(0, 0) != rows(1, 0) != rows(1, 1)


@given(st.integers(2, 30), st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=50)
def test_rows_of_a_group_do_not_meet_where_that_is_possible(n_batches, batch_size, seed):
    generator = np.random.default_rng(seed)
    rows = n_batches * batch_size + int(generator.integers(batch_size))
    positives = np.concatenate([np.repeat(i, int(generator.integers(1, n_batches + 1))) for i in range(rows)])[:rows]
    keys = np.stack([np.arange(rows), positives], axis=1)[generator.permutation(rows)]
    plan = BatchPlan([rows], batch_size=batch_size, seed=seed, keys=[keys])
    seen = Counter(row for batch in plan for _, row, _ in batch)
    assert set(seen.values()) == {1}
    assert len(seen) == n_batches * batch_size
    for batch in plan:
        values = keys[[row for _, row, _ in batch], 1]
        assert len(set(values.tolist())) == batch_size


@st.composite
def clustered(draw):
    """A plan over clusters of up to eight rows and rows in none, some of them linked by a positive they share."""
    seed = draw(st.integers(0, 10**6))
    batch_size, world_size, n_batches = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(2, 12))
    generator = np.random.default_rng(seed)
    rows = n_batches * batch_size * world_size + int(generator.integers(batch_size * world_size))
    clusters = np.repeat(np.arange(rows), generator.integers(1, 9, rows))[:rows]
    clusters[generator.random(rows) < draw(st.sampled_from([0, 0.3]))] = -1
    shared = np.repeat(np.arange(rows), generator.integers(1, n_batches + 1, rows))[:rows]
    keys = np.stack([np.arange(rows), generator.permutation(shared)], axis=1)
    arguments = {"sizes": [rows], "batch_size": batch_size, "seed": seed, "world_size": world_size}
    return arguments, n_batches, {"keys": [keys], "clusters": [clusters[generator.permutation(rows)]]}


@given(clustered(), st.integers(0, 2))
@settings(max_examples=150)
def test_clusters_change_nothing_that_a_plan_promises(case, epoch):
    """Every row once, none that share a positive together, the same for any number of processes, and again."""
    arguments, n_batches, more = case
    steps = batches(arguments, epoch, **more)
    shared = [[row for rank in step for row in rank] for step in steps]
    seen = Counter(row for step in shared for _, row, _ in step)
    assert set(seen.values()) == {1} and len(shared) == n_batches
    assert {visit for step in shared for _, _, visit in step} == {epoch}
    for step in shared:
        values = more["keys"][0][[row for _, row, _ in step], 1]
        assert len(set(values.tolist())) == len(step)
    assert steps == batches(arguments, epoch, **more)
    one = {**arguments, "batch_size": arguments["batch_size"] * arguments["world_size"], "world_size": 1}
    assert shared == [step[0] for step in batches(one, epoch, **more)]


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 12), st.integers(0, 1000))
def test_clusters_of_a_size_that_divides_a_batch_stay_whole(in_a_batch, size, n_batches, seed):
    """Smaller ones beside them, and what a pass leaves over, cut none of them but one."""
    generator, whole = np.random.default_rng(seed), in_a_batch * size
    small = np.repeat(np.arange(whole * n_batches, whole * n_batches + whole), generator.integers(1, size + 1, whole))
    clusters = np.concatenate([np.repeat(np.arange(in_a_batch * n_batches), size), small])
    clusters = clusters[generator.permutation(len(clusters))]
    plan = BatchPlan([len(clusters)], batch_size=whole, seed=seed, clusters=[clusters])
    parts = Counter((batch, int(clusters[row])) for batch, rows in enumerate(plan) for _, row, _ in rows)
    split = Counter(cluster for _, cluster in parts)
    full = range(in_a_batch * n_batches)
    assert all(split[cluster] <= 1 for cluster in full)
    assert sum(parts[part] < size for part in parts if part[1] in full) <= 1
    orders = []
    for epoch in range(3):
        plan.set_epoch(epoch)
        orders.append([sorted(row for _, row, _ in batch) for batch in plan])
    assert len(plan) < 4 or orders[0] != orders[1] or orders[1] != orders[2], "clusters meet others in the next pass"


def test_rows_linked_through_a_query_and_a_positive_are_one_group():
    keys = np.array([[1, 10], [1, 20], [2, 20], [3, 30], [4, 40], [5, 50]])
    for seed in range(30):
        for batch in BatchPlan([6], batch_size=2, seed=seed, keys=[keys]):
            assert len({0, 1, 2} & {row for _, row, _ in batch}) <= 1


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=60))
def test_groups_are_the_connected_components(pairs):
    """Against a loop that joins two sets at a time."""
    sets = [{row} for row in range(len(pairs))]
    for row, pair in enumerate(pairs):
        for other in range(row):
            if pair[0] == pairs[other][0] or pair[1] == pairs[other][1]:
                joined = sets[row] | sets[other]
                for member in joined:
                    sets[member] = joined
    groups = linked_rows(np.array(pairs))
    assert sorted(set(groups.tolist())) == list(range(len({id(one) for one in sets})))
    for row, group in enumerate(groups):
        assert set(np.flatnonzero(groups == group).tolist()) == sets[row]


def test_the_benchmark_of_planning_measures_what_it_says():
    found = measure(20_000)
    assert found.keys() == {"plan", "epoch", "limit", "peak_mb"} and all(value > 0 for value in found.values())
    keys = mined_keys(20_000)
    assert len(np.unique(keys[:, 0])) == 19_000 and 1000 < len(np.unique(keys[:, 1])) < 7000


def test_what_must_repeat_is_spread_evenly():
    keys = np.stack([np.arange(100), np.arange(100) % 4], axis=1)
    for batch in BatchPlan([100], batch_size=20, keys=[keys]):
        assert sorted(Counter(row % 4 for _, row, _ in batch).values()) == [5, 5, 5, 5]


def test_more_ranks_than_data_says_the_numbers():
    with pytest.raises(ConfigError, match=r"'tiny' has 10 rows, one batch takes 12 \(4 processes x 3\)"):
        BatchPlan([100, 10], batch_size=3, world_size=4, names=["big", "tiny"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sizes": []}, "no source"),
        ({"sizes": [50], "rank": 1}, "rank 1 of 1"),
        ({"sizes": [50], "weights": [0.0]}, "above 0"),
        ({"sizes": [50], "weights": [1.0, 2.0]}, "1 sources"),
        ({"sizes": [50, 50], "batch_size": [2]}, "2 sources"),
        ({"sizes": [50, 50], "weights": [1.0, 2.0], "round_robin": True}, "all sources the same"),
        ({"sizes": [50], "keys": [np.zeros((3, 2))]}, "50 rows and 3 keys"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        BatchPlan(**arguments)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=6), st.floats(0, 1))
def test_mixing_follows_the_power_of_the_size(sizes, alpha):
    weights = mixing_weights(sizes, [None] * len(sizes), alpha)
    assert sum(weights) == pytest.approx(1)
    for size, weight in zip(sizes, weights, strict=True):
        assert weight / weights[0] == pytest.approx((size / sizes[0]) ** alpha)


def test_an_explicit_weight_is_in_average_sources():
    assert mixing_weights([100, 100], [None, 3.0], 0.5) == pytest.approx([0.25, 0.75])
    with pytest.raises(ConfigError, match="above 0"):
        mixing_weights([100], [0.0])
    with pytest.raises(ConfigError, match="empty"):
        mixing_weights([100, 0], [None, None])
