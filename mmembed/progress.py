"""The bar of long work: rate and time left in a terminal; in a log file a line every half a minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(what: str, total: int | None, unit: str, done: int = 0, delay: float = 3.0) -> tqdm[Any]:
    """A bar on stderr, which work that ends within `delay` seconds does not show.

    Args:
        total: of all work; None where nobody knows.
        unit: with a space before it: " records".
        done: of an earlier process.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=what, total=total, initial=done, unit=unit, mininterval=seconds, delay=delay, file=sys.stderr,
    )  # fmt: skip
