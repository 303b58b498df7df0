"""Agreement, against two other implementations and a published example."""

from collections import Counter

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from data_tools.synthesis.agreement import alpha, kappa

grades = st.integers(0, 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(grades, min_size=1, max_size=5).map(tuple), min_size=1, max_size=30))
def test_alpha_is_that_of_krippendorff(units):
    table = np.full((5, len(units)), np.nan)
    for place, unit in enumerate(units):
        table[: len(unit), place] = unit
    there = {grade for unit in units if len(unit) > 1 for grade in unit}
    if len(there) < 2:
        assert alpha(Counter(units)) is None
        return
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal")
    assert alpha(Counter(units)) == pytest.approx(expected, abs=1e-9)


def test_alpha_of_the_published_example():
    """Four observers, twelve units: ordinal 0.815 (Krippendorff, "Computing Krippendorff's Alpha-Reliability")."""
    observers = (
        "123321412...",
        "1233224125.3",
        ".33323422514",
        "12332441251.",
    )
    units = [tuple(int(one) for one in column if one != ".") for column in zip(*observers, strict=True)]
    assert alpha(Counter(units)) == pytest.approx(0.815, abs=5e-4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(grades, grades), min_size=1, max_size=40), st.booleans())
def test_kappa_is_that_of_scikit_learn(pairs, quadratic):
    one, other = zip(*pairs, strict=True)
    found = kappa(Counter(pairs), quadratic)
    if len({*one, *other}) == 1:
        assert found is None
        return
    weights = "quadratic" if quadratic else None
    assert found == pytest.approx(cohen_kappa_score(one, other, labels=range(4), weights=weights), abs=1e-9)
