"""Tensors of a frozen part of a model, kept on disk by what they were computed from.

A store is a folder. Each process that adds to it writes a pair of files of its own: `NAME.features`, entries one behind
another (safetensors, so dtypes and shapes are kept), and `NAME.index`, a record of 40 bytes an entry, written when the
entry is whole. So processes never write to one file, a kill leaves at most bytes that no record names, and a reader
that meets half a record stops before it. Features are memory-mapped: resident only while they are used.

Reading costs about 30 us an entry beside the copy; the index 200 bytes of memory an entry. `limit` bounds what lies
below the store's parent folder, stores of other models included; nothing is deleted, a full store takes no more.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mmembed.errors import CacheError

logger = logging.getLogger(__name__)
RECORD = struct.Struct("<16sQQI")  # key, where the entry begins, its bytes, their checksum; then one of the record
RECORD_BYTES = RECORD.size + 4
REFRESH_SECONDS = 10  # how often a miss looks for what other processes added
Place = tuple[int, int, int, int]  # number of the file, begin, bytes, checksum


class FeatureStore:
    """Key of 16 bytes -> named tensors. Threads and processes may read and add at once; give each process its own.

    Args:
        folder: of this store; made where it is missing. Its parent is what `limit` bounds.
        limit: bytes of all features below the parent folder; nothing is added beyond.

    Raises:
        CacheError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._lock = threading.RLock()
        self._places: dict[bytes, Place] = {}
        self._files: list[Path] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._read: dict[Path, int] = {}  # bytes of each index that were read
        self._own: tuple[int, int, int] | None = None  # number of the file, descriptors of features and index
        self._process, self._used = os.getpid(), 0
        self._looked, self._closed = 0.0, False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.refresh()
        except OSError as error:
            raise CacheError(f"{self.folder}: cannot be used as a cache ({error}); name another folder") from None

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path, int]]:
        return FeatureStore, (self.folder, self.limit)  # files and locks stay in their process

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def bytes_used(self) -> int:
        """Of all stores below the parent folder, when it was last looked at."""
        return self._used

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors under a key; None where there are none, or where their bytes are damaged."""
        from safetensors.torch import load

        place = self._places.get(key)
        if place is None and time.monotonic() - self._looked > REFRESH_SECONDS:
            self.refresh()
            place = self._places.get(key)
        if place is None:
            return None
        try:
            entry = self._bytes(place)
        except (OSError, ValueError):  # gone, or emptied
            entry = b""
        if zlib.crc32(entry) != place[3]:
            logger.warning("%s: an entry of %s is damaged; it is computed again", self.folder, self._files[place[0]])
            self._places.pop(key, None)
            return None
        return load(entry)

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Adds an entry, unless it is there or the store is full. A disk that is full ends adding, with a warning."""
        from safetensors.torch import save

        if self._closed or key in self._places:
            return
        entry = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        with self._lock:
            if self._closed or key in self._places:
                return
            if self._used + len(entry) > self.limit:
                self._stop(f"{self.limit / 1e9:g} GB are used; delete old folders there, or allow more")
                return
            try:
                self._append(key, entry)
            except OSError as error:
                self._stop(f"cannot be written ({error.strerror or error}); free disk space")

    def refresh(self) -> None:
        """Reads what other processes added, and how much all stores use."""
        with self._lock:
            self._looked = time.monotonic()
            for index in sorted(self.folder.glob("*.index")):
                self._read_index(index)
            self._used = sum(file.stat().st_size for file in self.folder.parent.glob("*/*.features"))

    # Files ------------------------------------------------------------------------------------------------------------

    def _append(self, key: bytes, entry: bytes) -> None:
        if self._own is None or self._process != os.getpid():  # a fork has its parent's descriptors
            self._own, self._process = self._open(), os.getpid()
        number, features, index = self._own
        start = os.lseek(features, 0, os.SEEK_END)
        record = RECORD.pack(key, start, len(entry), zlib.crc32(entry))
        end = os.lseek(index, 0, os.SEEK_END)
        try:
            _write(features, entry)
            _write(index, record + struct.pack("<I", zlib.crc32(record)))
        except OSError:
            os.ftruncate(features, start)
            os.ftruncate(index, end)
            raise
        self._used += len(entry)
        self._places[key] = (number, start, len(entry), zlib.crc32(entry))
        self._read[self._files[number].with_suffix(".index")] = end + RECORD_BYTES

    def _open(self) -> tuple[int, int, int]:
        path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.features"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        descriptors = (os.open(path, flags, 0o644), os.open(path.with_suffix(".index"), flags, 0o644))
        self._files.append(path)
        return (len(self._files) - 1, *descriptors)

    def _read_index(self, index: Path) -> None:
        done = self._read.get(index, 0)
        with index.open("rb") as file:
            file.seek(done)
            content = file.read()
        features = index.with_suffix(".features")
        if done == 0 and len(content) >= RECORD_BYTES:
            self._files.append(features)
        for start in range(0, len(content) - RECORD_BYTES + 1, RECORD_BYTES):
            record, check = content[start : start + RECORD.size], content[start + RECORD.size : start + RECORD_BYTES]
            if struct.pack("<I", zlib.crc32(record)) != check:
                break
            key, begin, size, checksum = RECORD.unpack(record)
            self._places[key] = (self._files.index(features), begin, size, checksum)
            done += RECORD_BYTES
        self._read[index] = done

    def _bytes(self, place: Place) -> bytes:
        number, start, size, _ = place
        with self._lock:
            mapped = self._maps.get(number)
            if mapped is None or len(mapped) < start + size:  # the file has grown
                with self._files[number].open("rb") as file:
                    mapped = self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped[start : start + size]

    def _stop(self, why: str) -> None:
        self._closed = True
        logger.warning("%s: %s. Going on without adding to it", self.folder, why)


def _write(descriptor: int, content: bytes) -> None:
    """All of it: a nearly full disk takes a part and says so, and the rest raises."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
