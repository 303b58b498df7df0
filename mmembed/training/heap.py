"""Memory that the C library holds back when tensors of the CPU are freed, given back to the system.

Between the passes of a step nothing but vectors is alive, but the heap keeps the pages of the chunks that were, and the
score matrix goes beside them; after the comparison it is the other way round. Without giving back, a step's peak is the
sum of what it needs one after the other: batch 2,048 of the nano took 1,576 MB where 512 took 1,212, with it 1,273 and
1,208 (docs/log.md). Within a pass chunks of many shapes leave holes in the heaps of the threads, the more the longer it
takes, so there too pages go back now and then.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

CHUNKS = 16  # between two returns within a pass: at most 30 ms in some seconds
Made = TypeVar("Made")


def give_back() -> bool:
    """Returns free pages to the system: 1 to 30 ms. False where the C library has no such call (glibc has)."""
    trim = _malloc_trim()
    return trim is not None and bool(trim(0) >= 0)


def giving_back(made: Iterable[Made]) -> Iterator[Made]:
    """The same, with `give_back` after every `CHUNKS` of them."""
    for number, one in enumerate(made, start=1):
        yield one
        if number % CHUNKS == 0:
            give_back()


@cache
def _malloc_trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
