"""Histograms as coordinates: shares of each series, on one scale."""

import pytest

from mmembed.charts import histogram


def test_bars_are_shares_of_their_own_series_on_one_scale():
    chart = histogram({"a": [1, 3, 0, 0], "b": [0, 0, 50, 50]}, low=-1.0, high=1.0)
    plain = {name: [height for _, _, height in bars] for name, bars in chart["series"].items()}
    unit = plain["a"][1] / 0.75
    assert plain["a"] == pytest.approx([unit / 4, unit * 0.75, 0, 0], abs=0.2)
    assert plain["b"] == pytest.approx([0, 0, unit / 2, unit / 2], abs=0.2)
    places = [x for x, _, _ in chart["series"]["a"]]
    assert places[0] == chart["left"] and places[1] - places[0] == pytest.approx(chart["bar"], abs=0.2)
    assert places[-1] + chart["bar"] == pytest.approx(chart["right"], abs=0.2)
    assert [label for _, label in chart["x_ticks"]] == ["-1", "-0.5", "0", "0.5", "1"]
    assert all(y + height == pytest.approx(chart["bottom"], abs=0.2) for _, y, height in chart["series"]["b"])


def test_an_empty_series_has_no_bars():
    chart = histogram({"a": [0, 0], "b": [2, 2]}, low=0.0, high=1.0)
    assert [height for _, _, height in chart["series"]["a"]] == [0, 0]
