"""Vectors of contents that have many each, on disk, each content encoded once.

A file holds those of some contents, one behind another, under the digests of what was encoded. It is put in place whole
and mapped when it is read: a process may die at any moment, and what has no file is encoded again. Contents are found
by digest, not by row: a record more, other candidates or another retriever cost the contents that are new. Cost: tokens
x dimensions x bytes of the precision; one fsync a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_tools.files import digest, write_whole
from mmembed.errors import MmembedError
from mmembed.search.late_interaction import TokenVectors


class TokenStore:
    """Token vectors by the digest of their content, 16 bytes.

    Args:
        folder: holds nothing else.
        name: of model and settings; what others have left in the folder is deleted.

    Raises:
        MmembedError: a file is broken.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._places: dict[bytes, tuple[Any, int, int]] = {}  # its file, from which row to which
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.name.startswith(f"{name}-"):
                self._open(file)
            else:
                file.unlink()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, keys: Sequence[bytes], vectors: Sequence[NDArray[Any]]) -> None:
        """Those of some contents: a (T, W) array for each key. Raises OSError where the disk is full."""
        table: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
            "lengths": np.array([len(one) for one in vectors], np.int64),
            "vectors": np.concatenate(list(vectors)),  # (sum of T, W)
        }
        file = self.folder / f"{self.name}-{digest(table['keys'])}.safetensors"
        write_whole(file, save(table))
        self._open(file)

    def take(self, keys: Iterable[bytes]) -> TokenVectors:
        """Those of these contents, in this order."""
        places = [self._places[key] for key in keys]
        return TokenVectors.joined([vectors[start:stop] for vectors, start, stop in places])

    def _open(self, file: Path) -> None:
        try:
            tensors = safe_open(file, framework="numpy")
            keys, lengths = tensors.get_tensor("keys"), tensors.get_tensor("lengths")
            vectors = tensors.get_slice("vectors")
        except (SafetensorError, OSError) as error:
            raise MmembedError(f"{file}: broken ({error}); delete it, and its contents are encoded again") from error
        stops = np.cumsum(lengths).tolist()
        for key, stop, length in zip(keys, stops, lengths.tolist(), strict=True):
            self._places[key.tobytes()] = (vectors, stop - length, stop)
