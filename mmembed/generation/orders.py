"""Orders of documents as text, and as windows over a long list. Pure functions.

An order is a permutation of places from 0; as text it is numbered from 1: (1, 0, 2) is `[2] > [1] > [3]`. A model may
write anything, so reading never fails: what it names counts, in that order, and the rest follows as it was shown.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmembed.errors import MmembedError

_BRACKETED, _NUMBER = re.compile(r"\[([0-9\s,;>]+)\]"), re.compile(r"[0-9]+")
_DIGITS = 6  # longer ones number no document


@dataclass(frozen=True)
class Order:
    """places: all of them, best first. named: how many of them the text gave; the others keep their order behind."""

    places: tuple[int, ...]
    named: int


def write_order(places: Sequence[int]) -> str:
    """
    >>> write_order([1, 0, 2])
    '[2] > [1] > [3]'
    """
    return " > ".join(f"[{place + 1}]" for place in places)


def read_order(text: str, count: int) -> Order:
    """The order of `count` documents that a text gives.

    Numbers in brackets count, or any where there are none in brackets. One that is out of range is passed over; of one
    that stands twice the first counts; what is missing follows as it was shown.

    >>> read_order("Sure: [3] > [1] > [3] > [9]", 4)
    Order(places=(2, 0, 1, 3), named=2)
    """
    found = _NUMBER.findall(" ".join(_BRACKETED.findall(text))) or _NUMBER.findall(text)
    numbers = (int(one) - 1 for one in found if len(one.lstrip("0")) <= _DIGITS)
    named = dict.fromkeys(number for number in numbers if 0 <= number < count)
    return Order((*named, *(place for place in range(count) if place not in named)), len(named))


def best_order(grades: Sequence[float]) -> tuple[int, ...]:
    """Places by falling grade; equal ones in the order in which they are shown."""
    return tuple(sorted(range(len(grades)), key=lambda place: -grades[place]))


def swapped(order: Sequence[int], grades: Sequence[float], swaps: int, generator: random.Random) -> tuple[int, ...]:
    """The order after `swaps` exchanges of a document with a worse one behind it: each lowers the DCG. Fewer where no
    better document stands before a worse one any more."""
    places = list(order)
    for _ in range(swaps):
        pairs = [
            (first, second)
            for second in range(len(places))
            for first in range(second)
            if grades[places[first]] > grades[places[second]]
        ]
        if not pairs:
            break
        first, second = generator.choice(pairs)
        places[first], places[second] = places[second], places[first]
    return tuple(places)


def window_starts(count: int, size: int, stride: int) -> list[int]:
    """Where the windows over `count` documents begin, the last documents first (RankGPT, arXiv 2304.09542).

    Raises:
        MmembedError: windows would not overlap, so that nothing could rise from one to the next.

    >>> window_starts(100, 20, 10)
    [80, 70, 60, 50, 40, 30, 20, 10, 0]
    """
    if size < 2:
        raise MmembedError(f"window: {size}; an order has at least 2 documents")
    if not 1 <= stride < size:
        raise MmembedError(
            f"stride: {stride} with a window of {size}; give 1 to {size - 1}, so that the best of a window are in the "
            "next one, too"
        )
    return [*range(count - size, 0, -stride), 0] if count > 1 else []


def slide(
    counts: Sequence[int], size: int, stride: int, order: Callable[[list[tuple[int, list[int]]]], list[tuple[int, ...]]]
) -> list[list[int]]:
    """Ranks several lists through windows, the same window of all lists at a time.

    Args:
        counts: documents of each list.
        order: (list, places of its documents) of several windows -> a permutation of each.

    Returns:
        The places of each list, best first. The best `size` - `stride` are right where all orders are.
    """
    ranked = [list(range(count)) for count in counts]
    starts = [window_starts(count, size, stride) for count in counts]
    for step in range(max(map(len, starts), default=0)):
        at = [number for number, found in enumerate(starts) if step < len(found)]
        windows = [(number, ranked[number][starts[number][step] : starts[number][step] + size]) for number in at]
        for (number, window), found in zip(windows, order(windows), strict=True):
            start = starts[number][step]
            ranked[number][start : start + size] = [window[place] for place in found]
    return ranked
