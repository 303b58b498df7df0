"""One process a folder: a lock that the system frees where its holder dies, and a name for whoever has to wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmembed.errors import MmembedError


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Holds the output folder. The system frees the lock of a process that died.

    Raises:
        MmembedError: another process works there.
    """
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    owner = output / ".owner"
    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise MmembedError(f"{output}: {who} works there; wait for its end, or choose another output") from None
    try:
        owner.write_text(f"process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")
        yield
    finally:
        lock.release()
