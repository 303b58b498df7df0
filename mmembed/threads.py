"""Work that several threads of a CPU do beside each other, each on its share of torch's threads.

The products of a narrow model (hidden size up to `NARROW`) are too small to share between threads: two threads that
compute a batch each finish 1.6 to 2 times as soon as two that share every product (docs/log.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

NARROW = 1024
Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(
    given: Iterable[Given], make: Callable[[Given], Made], threads: int, begin: Callable[[], None] | None = None
) -> Iterator[Made]:
    """`make` of each, in order, by `threads` threads that are at most one ahead of the caller; `begin` runs in each."""
    with ThreadPoolExecutor(threads, thread_name_prefix="mmembed", initializer=begin) as pool:
        flying: deque[Future[Made]] = deque()
        try:
            for one in given:
                flying.append(pool.submit(make, one))
                if len(flying) > threads:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


def beside_each_other(given: Iterable[Given], make: Callable[[Given], Made], workers: int) -> Iterator[Made]:
    """`make` of each, in order, by workers that divide torch's threads among them.

    `make` enters grad modes by itself: they belong to a thread. Under autocast a cast weight is not shared between
    workers, because one made without gradients would cut the graph of another.
    """
    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(max(1, threads // workers))  # of the calling thread alone, but for MKL's
        torch.set_autocast_cache_enabled(False)

    try:
        yield from ahead(given, make, workers, begin)
    finally:
        torch.set_num_threads(threads)
