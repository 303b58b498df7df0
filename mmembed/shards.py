"""Rows of an array on disk that are computed shard by shard, and none twice.

    NAME.rows      the rows, one behind another: (N, W) of one dtype, mapped when they are read
    NAME.done      a line with dtype and width, then a line for each complete shard: its number, its key, and what its
                   writer notes of it

The key of a shard is a digest of all that its rows depend on: the contents, the model, the settings. A shard is
complete when its line is on the disk, and the line is written after the rows are. So a process may die at any moment:
what has no whole line is computed again, into the same place. A shard whose key has changed loses its line before its
rows are touched. One process writes at a time (the command holds a lock).

Cost: two fsync a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.files import write_whole


class Shards:
    """An array (N, W) of which every row belongs to one shard.

    Args:
        folder, name: where it lies.
        rows: N.
        size: rows of a shard, but of the last.
        keys: of the shards, in order.
        header: bytes before the first row, which somebody else writes.
    """

    def __init__(self, folder: Path, name: str, rows: int, size: int, keys: list[str], header: int = 0) -> None:
        assert len(keys) == -(-rows // size), f"{name}: {len(keys)} keys for {rows} rows in shards of {size}"
        self.rows, self.size, self.keys, self.name, self.header = rows, size, keys, name, header
        self._rows, self._journal = folder / f"{name}.rows", folder / f"{name}.done"
        self.dtype: np.dtype[Any] | None = None
        self.width = 0
        self._done: dict[int, Any] = {}  # number -> its note
        self._read()

    def missing(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of each shard that is still to compute."""
        for number in range(len(self.keys)):
            if number not in self._done:
                yield number, self.span(number)

    @property
    def complete(self) -> int:
        """Rows that are there."""
        return sum(self.span(number).stop - self.span(number).start for number in self._done)

    @property
    def path(self) -> Path:
        """The file of the rows."""
        return self._rows

    def note(self, number: int) -> Any:
        """What was noted of a complete shard."""
        return self._done[number]

    def span(self, number: int) -> slice:
        return slice(number * self.size, min((number + 1) * self.size, self.rows))

    def write(self, number: int, values: NDArray[Any], note: Any = None) -> None:
        """Adds the rows of a shard, with a note that JSON can hold.

        Raises:
            MmembedError: another width or dtype than the rows before.
            OSError: the disk is full; the shard is as missing as before.
        """
        span = self.span(number)
        assert values.ndim == 2 and len(values) == span.stop - span.start, f"{self.name}: {values.shape} at {span}"
        if self.dtype is None:
            self.dtype, self.width = values.dtype, values.shape[1]
            self._rewrite()
        if (values.dtype, values.shape[1]) != (self.dtype, self.width):
            raise MmembedError(
                f"{self._rows}: {values.shape[1]} dimensions of {values.dtype} behind {self.width} of {self.dtype}; "
                f"the model has changed while it was used: delete {self._rows.parent} to compute all again"
            )
        self._put(span.start, np.ascontiguousarray(values))
        with self._journal.open("ab") as file:
            file.write(self._line(number, note).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[number] = note

    def open(self) -> NDArray[Any]:
        """All rows, mapped: (N, W)."""
        assert self.dtype is not None and len(self._done) == len(self.keys), f"{self.name} is not complete"
        return np.memmap(self._rows, self.dtype, "r", self.header, (self.rows, self.width))

    def read(self, number: int) -> NDArray[Any]:
        """The rows of one shard."""
        span = self.span(number)
        return np.array(self.open()[span])

    def _put(self, start: int, values: NDArray[Any]) -> None:
        descriptor = os.open(self._rows, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            view, at = memoryview(values.tobytes()), self.header + start * self.width * values.dtype.itemsize
            while view:  # a nearly full disk takes a part
                written = os.pwrite(descriptor, view, at)
                view, at = view[written:], at + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        """What the journal says, as far as it is whole and of these keys; the rest is forgotten."""
        lines = self._journal.read_bytes().split(b"\n")[:-1] if self._journal.exists() else []
        head = _parsed(lines[0]) if lines else None
        if not isinstance(head, dict):
            return
        self.dtype, self.width = np.lib.format.descr_to_dtype(head["dtype"]), head["width"]
        there = self._rows.stat().st_size if self._rows.exists() else 0
        for line in lines[1:]:
            entry = _parsed(line)
            if not isinstance(entry, list):
                continue
            number, key, *note = entry
            inside = number < len(self.keys) and self.keys[number] == key
            if inside and self.header + self.span(number).stop * self.width * self.dtype.itemsize <= there:
                self._done[number] = note[0] if note else None
        if not self._done:
            self.dtype = None
            return
        self._rewrite()

    def _rewrite(self) -> None:
        assert self.dtype is not None
        head = json.dumps({"width": self.width, "dtype": np.lib.format.dtype_to_descr(self.dtype)})
        lines = [head, *(self._line(number, note) for number, note in sorted(self._done.items()))]
        write_whole(self._journal, ("\n".join(lines) + "\n").encode())

    def _line(self, number: int, note: Any) -> str:
        return json.dumps([number, self.keys[number], *([] if note is None else [note])])


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut off by a kill
        return None
