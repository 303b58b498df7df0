"""How far judgements agree: with each other, and with labels that are there.

    alpha = 1 - Do / De      Krippendorff's, over units that were judged twice or more ("Computing Krippendorff's
                             Alpha-Reliability", 2011): De is the disagreement of values that are paired at random
    kappa = 1 - Do / De      Cohen's (1960, weighted 1968): De follows from the two margins

Both are 1 where all agree, 0 where chance does as well, and not defined where there is one value only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product

Distance = Callable[[int, int], float]


def alpha(units: Mapping[tuple[int, ...], int]) -> float | None:
    """Krippendorff's alpha of grades, with the distance of ordinal data; None where it is not defined.

    Args:
        units: the grades of a unit -> how many units have these.
    """
    paired: dict[tuple[int, int], float] = {}
    for grades, count in units.items():
        of = Counter(grades)
        for one, other in product(of, of) if len(grades) > 1 else ():
            ways = of[one] * (of[other] - (one == other))
            paired[one, other] = paired.get((one, other), 0.0) + count * ways / (len(grades) - 1)
    margin: dict[int, float] = {}
    for (one, _), weight in paired.items():
        margin[one] = margin.get(one, 0.0) + weight
    total, distance = sum(margin.values()), _ordinal(margin)
    expected = sum(
        margin[one] * margin[other] * distance(one, other) / (total - 1) for one, other in product(margin, margin)
    )
    if not expected:
        return None
    return 1 - sum(weight * distance(*pair) for pair, weight in paired.items()) / expected


def kappa(table: Mapping[tuple[int, int], int], quadratic: bool) -> float | None:
    """Cohen's kappa of two judges; None where it is not defined.

    Args:
        table: (one's grade, the other's) -> how often.
        quadratic: a disagreement weighs as the square of the distance; else all weigh the same.
    """
    rows: Counter[int] = Counter()
    columns: Counter[int] = Counter()
    for (one, other), count in table.items():
        rows[one] += count
        columns[other] += count

    def distance(one: int, other: int) -> float:
        return float((one - other) ** 2) if quadratic else float(one != other)

    observed = sum(count * distance(*pair) for pair, count in table.items())
    expected = sum(rows[one] * columns[other] * distance(one, other) for one, other in product(rows, columns))
    return 1 - observed * rows.total() / expected if expected else None


def _ordinal(margin: Mapping[int, float]) -> Distance:
    """The square of how many values lie between two, the two counted half."""

    def distance(one: int, other: int) -> float:
        low, high = sorted((one, other))
        between = sum(weight for value, weight in margin.items() if low <= value <= high)
        return float(between - (margin[low] + margin[high]) / 2) ** 2

    return distance
