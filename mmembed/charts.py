"""Line charts, histograms, intervals and reliability plots as SVG coordinates, and the frame of pages that show them:
one file, nothing fetched, dark and light.

`pages/chart.html` draws what the functions here give, `pages/page.css` is the style that all reports share. jinja2
comes with torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

PAGES = Path(__file__).with_name("pages")


def page_environment() -> jinja2.Environment:
    """A jinja2 environment that finds the shared pages; a name that a page misspells is an error."""
    return jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(PAGES),
    )


def curve(points: Sequence[tuple[float, float]], width: int = 640, height: int = 240) -> dict[str, Any] | None:
    """A line chart as SVG coordinates: raw values, their running mean, ticks. None for fewer than two points."""
    if len(points) < 2:
        return None
    left, right, top, bottom = 44, 12, 12, 34
    steps, values = [step for step, _ in points], [value for _, value in points]
    ticks = nice_ticks(min(0.0, min(values)), max(values))
    low, high = ticks[0], max(ticks[-1], max(values))

    def x(step: float) -> float:
        return round(left + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (width - left - right), 1)

    def y(value: float) -> float:
        return round(height - bottom - (value - low) / ((high - low) or 1) * (height - top - bottom), 1)

    def path(series: Sequence[float]) -> str:
        return " ".join(f"{x(step)},{y(value)}" for step, value in zip(steps, series, strict=True))

    return {
        "width": width, "height": height, "left": left, "right": width - right, "bottom": height - bottom,
        "raw": path(values), "mean": path(running_mean(values, max(1, len(values) // 20))),
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in nice_ticks(0, steps[-1]) if steps[0] <= tick <= steps[-1]],
        "first": f"{values[0]:.2f}", "last": f"{running_mean(values, max(1, len(values) // 20))[-1]:.2f}",
    }  # fmt: skip


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], even: bool = False, width: int = 640, height: int = 260
) -> dict[str, Any] | None:
    """Several lines over one pair of axes as SVG coordinates; None where no series has two points.

    Args:
        series: name -> (x, y) in the order of x.
        even: the x of all series stand at equal distances, each with its label: dimensions, layers, settings.
    """
    if not any(len(points) > 1 for points in series.values()):
        return None
    left, right, top, bottom = 56, 22, 12, 46
    across = sorted({x for points in series.values() for x, _ in points})
    values = [y for points in series.values() for _, y in points]
    y_ticks = nice_ticks(min(values), max(values))
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    places = {value: place for place, value in enumerate(across)}

    def x(value: float) -> float:
        share = places[value] / (len(across) - 1) if even else (value - across[0]) / ((across[-1] - across[0]) or 1)
        return round(left + share * (width - left - right), 1)

    def y(value: float) -> float:
        return round(height - bottom - (value - low) / ((high - low) or 1) * (height - top - bottom), 1)

    ticks = [(x(value), f"{value:g}") for value in across] if even else [
        (round(left + (tick - across[0]) / ((across[-1] - across[0]) or 1) * (width - left - right), 1), f"{tick:g}")
        for tick in nice_ticks(across[0], across[-1]) if across[0] <= tick <= across[-1]
    ]  # fmt: skip
    return {
        "width": width, "height": height, "left": left, "right": width - right, "top": top, "bottom": height - bottom,
        "series": {name: [(x(one), y(two), f"{one:g}: {two:.3f}") for one, two in points]
                   for name, points in series.items()},
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_ticks], "x_ticks": ticks,
    }  # fmt: skip


def differences(
    rows: Sequence[tuple[str, float, float, float, str]], width: int = 640, line: int = 24
) -> dict[str, Any] | None:
    """Differences with their intervals, one below the other, as SVG coordinates on a scale that holds 0. None for none.

    Args:
        rows: name, difference, low, high, and a word for it that the page colours by.
    """
    if not rows:
        return None
    left, right, top, bottom = 210, 12, 6, 30
    bounds = [bound for _, _, low, high, _ in rows for bound in (low, high)]
    ticks = nice_ticks(min(0.0, *bounds), max(0.0, *bounds))
    first, last = min(ticks[0], *bounds), max(ticks[-1], *bounds)

    def x(value: float) -> float:
        return round(left + (value - first) / ((last - first) or 1) * (width - left - right), 1)

    height = top + line * len(rows) + bottom
    return {
        "width": width, "height": height, "left": left, "top": top, "bottom": height - bottom, "zero": x(0.0),
        "rows": [{"name": name, "y": top + line * place + line / 2, "x": x(value), "low": x(low), "high": x(high),
                  "word": word, "text": f"{value:+.3f}, {low:+.3f} to {high:+.3f}"}
                 for place, (name, value, low, high, word) in enumerate(rows)],
        "ticks": [(x(tick), f"{tick:+g}" if tick else "0") for tick in ticks],
    }  # fmt: skip


def histogram(
    counts: Mapping[str, Sequence[int]], low: float, high: float, width: int = 640, height: int = 220
) -> dict[str, Any]:
    """Series counted in the same equal bins from low to high, each as shares of its sum, as SVG coordinates."""
    left, right, top, bottom = 58, 16, 12, 46
    bins = len(next(iter(counts.values())))
    shares = {name: [count / max(1, sum(one)) for count in one] for name, one in counts.items()}
    y_ticks = nice_ticks(0, max(max(one) for one in shares.values()))
    top_share, step = max(y_ticks[-1], *map(max, shares.values())), (high - low) / bins

    def x(value: float) -> float:
        return round(left + (value - low) / ((high - low) or 1) * (width - left - right), 1)

    def y(share: float) -> float:
        return round(height - bottom - share / top_share * (height - top - bottom), 1)

    bars = {
        name: [
            (x(low + place * step), y(share), round(height - bottom - y(share), 1)) for place, share in enumerate(one)
        ]
        for name, one in shares.items()
    }
    return {
        "width": width, "height": height, "left": left, "right": width - right, "bottom": height - bottom,
        "bar": round((width - left - right) / bins, 1), "series": bars,
        "y_ticks": [(y(tick), f"{100 * tick:g} %") for tick in y_ticks],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in nice_ticks(low, high) if low <= tick <= high],
    }  # fmt: skip


def reliability(bins: Sequence[tuple[int, float, float]], width: int = 320, height: int = 320) -> dict[str, Any] | None:
    """A reliability plot as SVG coordinates: what share is relevant at each probability. None without a pair.

    Args:
        bins: (pairs, mean probability, share that is relevant) of each equal bin from 0 to 1.
    """
    total = sum(count for count, _, _ in bins)
    if not total:
        return None
    left, right, top, bottom = 40, 12, 12, 34

    def x(value: float) -> float:
        return round(left + value * (width - left - right), 1)

    def y(value: float) -> float:
        return round(height - bottom - value * (height - top - bottom), 1)

    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    bars = [(x(place / len(bins)), y(count / total)) for place, (count, _, _) in enumerate(bins)]
    return {
        "width": width, "height": height, "left": left, "right": width - right, "top": top, "bottom": height - bottom,
        "bars": [(across, up, round(height - bottom - up, 1)) for across, up in bars],
        "bar": round((width - left - right) / len(bins), 1),
        "points": [(x(probability), y(share), count) for count, probability, share in bins if count],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks], "x_ticks": [(x(tick), f"{tick:g}") for tick in ticks],
    }  # fmt: skip


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to about `high`."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    start = math.floor(low / step)
    return [round((start + number) * step, 10) for number in range(math.floor(high / step + 1e-9) - start + 1)]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value with its `reach` neighbours on either side."""
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]
