"""Plots as coordinates: histograms, lines, differences with their intervals."""

import pytest

from mmembed.charts import differences, histogram, lines


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


def test_lines_share_their_axes_and_stand_evenly_where_asked():
    chart = lines({"a": [(8, 0.1), (16, 0.3), (256, 0.5)], "b": [(16, 0.2)]}, even=True)
    across = [x for x, _, _ in chart["series"]["a"]]
    assert across == [chart["left"], (chart["left"] + chart["right"]) / 2, chart["right"]]
    assert chart["series"]["b"][0][0] == across[1] and [label for _, label in chart["x_ticks"]] == ["8", "16", "256"]
    heights = [y for _, y, _ in chart["series"]["a"]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2) and heights[0] > heights[2]
    ticks = {label: y for y, label in chart["y_ticks"]}
    assert ticks["0.1"] == heights[0] and ticks["0.5"] == heights[2]
    apart = lines({"a": [(0.0, 1.0), (0.1, 1.0), (1.0, 2.0)]})
    near, far = (apart["series"]["a"][place][0] - apart["left"] for place in (1, 2))
    assert near == pytest.approx(far / 10, abs=0.1)
    assert lines({"a": [(1, 1.0)]}) is None


def test_differences_are_on_a_scale_that_holds_0():
    chart = differences([("a", 0.2, 0.1, 0.3, "better"), ("b", -0.1, -0.2, 0.05, "same")])
    first, second = chart["rows"]
    assert chart["zero"] < first["low"] < first["x"] < first["high"] and second["low"] < chart["zero"] < second["high"]
    assert first["high"] - first["x"] == pytest.approx(first["x"] - first["low"], abs=0.2)
    assert second["y"] - first["y"] == 24 and chart["bottom"] < chart["height"]
    assert {label: x for x, label in chart["ticks"]}["0"] == chart["zero"]
    right = differences([("a", 0.2, 0.1, 0.3, "better")])
    assert right["zero"] == right["left"] and differences([]) is None
