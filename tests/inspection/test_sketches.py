"""Counts of streams against collections, numpy and sets that hold everything."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.inspection import sketches
from data_tools.inspection.sketches import Digests, Names, Numbers, Repeated, Reservoir

SMALL = st.lists(st.integers(0, 30), max_size=200)


def _filled(folder: Path, values: list[int]) -> Digests:
    digests = Digests(folder)
    for value in values:
        digests.add(value)
    return digests


@given(SMALL, st.integers(1, 40))
def test_digests_are_counted_as_a_counter_counts_whatever_the_parts(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], part: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketches, "_PART", part)
        distinct, repeated = _filled(tmp_path_factory.getbasetemp(), values).summary(most=100)
    counts = Counter(values)
    assert distinct == len(counts)
    assert repeated == {value: count for value, count in counts.items() if count > 1}
    assert list(repeated.values()) == sorted(repeated.values(), reverse=True)


@given(SMALL, SMALL, st.integers(1, 40))
def test_what_two_streams_share_is_the_intersection(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], second: list[int], part: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketches, "_PART", part)
        assert _filled(folder, first).also_in(_filled(folder, second)) == len(set(first) & set(second))


def test_digests_use_all_64_bits_and_leave_no_file(tmp_path: Path) -> None:
    values = [2**64 - 1, 0, 2**63, 2**64 - 1]
    assert _filled(tmp_path, values).summary(5) == (3, {2**64 - 1: 2})
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_numbers_are_those_of_numpy_up_to_their_bound(values: list[float]) -> None:
    numbers = Numbers()
    for value in values:
        numbers.add(value)
    found = numbers.as_dict()
    assert found["count"] == len(values) and found["exact"]
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert found["percentiles"] == {
        str(one): pytest.approx(np.percentile(values, one), abs=1e-5) for one in (0, 5, 25, 50, 75, 95, 100)
    }


def test_beyond_the_bound_percentiles_are_near_and_the_ends_exact() -> None:
    values = np.random.default_rng(0).lognormal(size=60_000)
    numbers = Numbers(seed=1)
    for value in values.tolist():
        numbers.add(value)
    found = numbers.as_dict()
    assert not found["exact"]
    assert found["percentiles"]["0"] == pytest.approx(values.min(), abs=1e-6)
    assert found["percentiles"]["100"] == pytest.approx(values.max(), abs=1e-6)
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-6)
    ranks = [(values < found["percentiles"][str(one)]).mean() * 100 - one for one in (5, 25, 50, 75, 95)]
    assert np.abs(ranks).max() < 1.5


def test_a_reservoir_keeps_everything_that_fits_in_order_and_else_each_as_likely() -> None:
    small: Reservoir[int] = Reservoir(50)
    for number in range(40):
        place = small.place()
        assert place is not None
        small.put(place, number)
    assert small.items() == list(range(40))
    drawn: Counter[int] = Counter()
    for seed in range(400):
        sample: Reservoir[int] = Reservoir(10, seed)
        for number in range(100):
            if (place := sample.place()) is not None:
                sample.put(place, number)
        assert sample.items() == sorted(sample.items()) and len(sample) == 10
        drawn.update(sample.items())
    deviations = np.array([drawn[number] - 40 for number in range(100)]) / 6  # binomial(400, 0.1): 6
    assert np.abs(deviations).max() < 4.5
    assert abs((deviations**2).mean() - 1) < 0.5


def test_the_balance_of_names_is_their_entropy() -> None:
    names = Names()
    for name, count in (("a", 8), ("b", 4), ("c", 4)):
        for _ in range(count):
            names.add(name)
    found = names.as_dict(shown=2)
    assert found["effective"] == pytest.approx(2**1.5, abs=0.01)  # entropy of (1/2, 1/4, 1/4): 1.5 bits
    assert (found["distinct"], found["least"], found["total"]) == (3, 4, 16)
    assert found["counts"] == {"a": 8, "b": 4}


def test_names_without_end_keep_the_frequent_ones_and_say_that_others_are_left_out() -> None:
    names, repeated = Names(), Repeated[str]()
    for number in range(50_000):
        for digest, name in ((1, "often"), (10 + number, f"once {number}")):
            names.add(name)
            repeated.add(digest, name)
    found = names.as_dict(shown=1)
    assert found["counts"] == {"often": 50_000}
    assert not found["exact"] and found["effective"] is None and found["total"] == 100_000
    assert repeated.of(1) == "often" and repeated.of(9) is None
    assert len(repeated._seen) <= 2 * sketches.NAMES
