"""Memory that the C library holds back when tensors of the CPU are freed, given back to the system.

Between the passes of a step nothing but vectors is alive, but the heap keeps the pages of the chunks that were, and the
score matrix goes beside them; after the comparison it is the other way round. Without giving back, a step's peak is the
sum of what it needs one after the other: batch 2,048 of the nano took 1,576 MB where 512 took 1,212, with it 1,273 and
1,208 (docs/log.md).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> bool:
    """Returns free pages to the system: 1 to 30 ms. False where the C library has no such call (glibc has)."""
    trim = _malloc_trim()
    return trim is not None and bool(trim(0) >= 0)


@cache
def _malloc_trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
