"""A hidden sibling for what is being written, so that a destination is never half of anything.

Where the destination is a mount point (the volume of a container) it is a hidden child instead: nothing moves between
file systems. `.NAME.writing-HOST-PID` belongs to the process of that number on that host. A killed process leaves its
sibling behind; the next write to the same destination sweeps what dead processes of this host left. What another host
left stays: from here nobody can see whether it still writes (a shared disk, containers).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Part = Literal["writing", "objective", "old"]


@contextmanager
def staging(destination: Path, part: Part = "writing") -> Iterator[Path]:
    """The path of a sibling of `destination` where nothing is, to write to and to move from; gone at the end.

    Args:
        part: what is written, where several things go to one destination at a time.
    """
    sweep(destination, part)
    destination.parent.mkdir(parents=True, exist_ok=True)
    sibling = _sibling(destination, part)
    try:
        yield sibling
    finally:
        _remove(sibling)


def put_in_place(new: Path, destination: Path) -> None:
    """Puts a folder in the place of another, which is deleted only when the new one stands there."""
    old = _sibling(destination, "old")
    if destination.exists():
        os.replace(destination, old)
    try:
        os.replace(new, destination)
    except OSError:
        if old.exists():
            os.replace(old, destination)
        raise
    _remove(old)


def sweep(destination: Path, part: Part = "writing") -> None:
    """Removes what killed processes left beside `destination`: of `part` also where their number is ours now.

    A kill inside of `put_in_place` leaves the old folder as the only one: it comes back.
    """
    destination = destination.absolute()
    home = _home(destination)
    if not home.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.(\w+)-{re.escape(socket.gethostname())}-(\d+)")
    for sibling in sorted(home.iterdir()):
        found = pattern.fullmatch(sibling.name)
        if found is None:
            continue
        left, pid = found[1], int(found[2])
        if _alive(pid) and not (pid == os.getpid() and left in (part, "old")):
            continue
        if left == "old" and not destination.exists():
            os.replace(sibling, destination)
        else:
            _remove(sibling)


def _sibling(destination: Path, part: Part) -> Path:
    destination = destination.absolute()  # `.` has no name
    return _home(destination) / f".{destination.name}.{part}-{socket.gethostname()}-{os.getpid()}"


def _home(destination: Path) -> Path:
    """A folder on the file system that the destination is on."""
    return destination if os.path.ismount(destination) else destination.parent


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there `kill` with signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    """As far as that is possible: a leftover is no reason to fail."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
