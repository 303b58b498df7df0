"""From the numbers of two arms to a verdict, by a rule that is written down before the runs.

Seeds are paired: run s of both arms begins alike. The interval is Student's t over the paired differences,
95 %: with three seeds it is wide (4.3 standard errors), and honestly so. What is not trained has no seeds; its interval
is a bootstrap over the queries, which both arms share.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.claims.declaration import Comparison
from eval.significance import CONFIDENCE, interval_of_means

HOLDS, FAILS, OPEN = "holds", "does not hold at this scale", "inconclusive"
RULE = """\
Each comparison is a mean of differences d = arm - other, paired by seed, with a 95 % interval of Student's t over the
seeds. Arms of one seed share the order of the data and, where they have the same weights, their first values. Fewer
than two seeds, or seeds that all give one number, have no interval. Arms that are measured without training have one
number; the interval of their difference is a bootstrap over the queries (percentiles of 10,000 samples). Several tasks
in one line are their mean. "Negligible" is 0.005 unless the table says otherwise.

1. No interval: **inconclusive**.
2. "Higher" and "lower": **does not hold at this scale** where the whole interval is within the negligible, or on the
   wrong side of 0; **holds** where the whole interval is on the claimed side of 0; otherwise **inconclusive**.
3. "Not lower": **holds** where the whole interval is above -negligible, **does not hold at this scale** where it is all
   below that, otherwise **inconclusive**.

A claim holds where all its comparisons hold, does not hold where one does not, and is inconclusive otherwise."""


@dataclass(frozen=True)
class Outcome:
    """A comparison and its numbers, by seed where both arms have run; `low` and `high` are None without interval."""

    comparison: Comparison
    arm: Mapping[int, float]
    than: Mapping[int, float]
    difference: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str


def compare(
    comparison: Comparison,
    arm: Mapping[int, float],
    than: Mapping[int, float],
    by_query: Sequence[Sequence[float]] | None = None,
) -> Outcome:
    """seed -> number of each arm; seeds that one arm lacks are left out.

    by_query: of arms that were not trained, the differences of each task's queries.
    """
    seeds = sorted(arm.keys() & than.keys())
    ours, theirs = ({seed: side[seed] for seed in seeds} for side in (arm, than))
    differences = [arm[seed] - than[seed] for seed in seeds]
    mean = statistics.fmean(differences) if differences else None
    bounds = interval(differences) if by_query is None else interval_of_means(by_query)
    low, high = bounds or (None, None)
    verdict, reason = judged(comparison, bounds, len(seeds))
    return Outcome(comparison, ours, theirs, mean, low, high, verdict, reason)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Student's t over paired differences; None for fewer than two, or where they are all the same.

    >>> [round(bound, 3) for bound in interval([0.01, 0.02, 0.03])]  # 0.02 -+ 4.303 * 0.01 / sqrt(3)
    [-0.005, 0.045]
    """
    from scipy.stats import t

    if len(differences) < 2 or len(set(differences)) == 1:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    mean = statistics.fmean(differences)
    return mean - reach, mean + reach


def judged(comparison: Comparison, bounds: tuple[float, float] | None, seeds: int) -> tuple[str, str]:
    """The verdict of `RULE` on one comparison, and why."""
    if bounds is None:
        return OPEN, f"{seeds} seed{'s' * (seeds != 1)}" if seeds < 2 else "the seeds all give one number"
    low, high = bounds if comparison.direction != "lower" else (-bounds[1], -bounds[0])
    small = comparison.negligible
    if comparison.direction == "not_lower":
        if low > -small:
            return HOLDS, "nothing is lost that matters"
        return (FAILS, "it loses") if high < -small else (OPEN, "the interval crosses -negligible")
    if -small < low and high < small:
        return FAILS, "no difference that matters"
    if low > 0:
        return HOLDS, "the interval is on the claimed side"
    return (FAILS, "the interval is on the other side") if high < 0 else (OPEN, "the interval holds 0")


def overall(verdicts: Sequence[str]) -> str:
    """Of a claim, from those of its comparisons."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else OPEN
