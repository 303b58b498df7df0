"""Files that are whole or not there, disks that are full, and digests of what a result depends on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmembed.errors import MmembedError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_SORTED = json.JSONEncoder(sort_keys=True)  # kept: json.dumps with an option builds one at every call


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old or the new one."""
    staged = path.with_name(f".{path.name}.writing")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Around work that goes on in `output` when it is started again.

    Raises:
        MmembedError: instead of the OSError of a full disk, or of a file that may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise MmembedError(f"{error.filename or output}: {error.strerror}; correct its rights") from error
        if error.errno not in _FULL:
            raise
        raise MmembedError(
            f"{error.filename or output}: cannot be written ({error.strerror}); what is complete is kept: free "
            "disk space there, then the same command goes on"
        ) from error


def stamps(paths: Iterable[Path]) -> list[Any]:
    """Names, sizes and times of files, of those in folders, and of the pictures' table beside a file."""
    files: list[Path] = []
    for path in paths:
        files += sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        table = path.with_name("images.parquet")
        files += [table] if path.is_file() and table.is_file() else []
    return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]


def digest(*parts: Any) -> str:
    """Of arrays, bytes and what JSON can hold."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            encoded = f"{part.dtype.str}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        else:
            plain = b"null" if part is None else part
            encoded = plain if isinstance(plain, bytes) else _SORTED.encode(plain).encode()
        state.update(len(encoded).to_bytes(8, "little") + encoded)
    return state.hexdigest()
