"""Files that are whole or not there, and digests of what a result depends on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

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
