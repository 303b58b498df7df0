"""Vectors in many Arrow or parquet files, read as one array.

    vectors/00000.arrow      columns `id` and `vector` (a list of fixed size) of the first rows, 00001 of the next, ...

An Arrow file is not compressed, so its rows are mapped: nothing is copied that is not read, as of a .npy file. A
parquet file is read whole, and the last two stay in memory: blocks in order cost one pass over the files, single rows
here and there a file each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError

ID, VECTOR = "id", "vector"
KEPT = {".arrow": 256, ".parquet": 2}  # files that are open, or in memory, at a time


class StoredTables:
    """An array (N, W) of the files of a folder, in the order of their names. Read only, by rows.

    Raises:
        MmembedError: no such files, or one that is broken or of another width or dtype than the first.
    """

    ndim = 2

    def __init__(self, folder: Path) -> None:
        self._files = sorted(file for file in folder.glob("*") if file.suffix in KEPT)
        if not self._files:
            raise MmembedError(f"{folder}: holds no .arrow or .parquet files; write them with `mmembed encode`")
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        counts = [_rows_of(file) for file in self._files]
        self._starts = [0, *np.cumsum(counts).tolist()]
        first = self._part(0)
        self.dtype, self.shape = first.dtype, (self._starts[-1], first.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64] | list[int]) -> NDArray[Any]:
        """(n, W)."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._block(start, max(start, stop))
            rows = np.arange(start, stop, step)
        wanted = np.asarray(rows, np.int64)  # (n,)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(parts):
            chosen = parts == number
            found[chosen] = self._part(int(number))[wanted[chosen] - self._starts[number]]
        return found

    def _block(self, start: int, stop: int) -> NDArray[Any]:
        pieces = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[number + 1])
            pieces.append(self._part(number)[start - self._starts[number] : end - self._starts[number]])
            start, number = end, number + 1
        if not pieces:
            return np.empty((0, self.shape[1]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _part(self, number: int) -> NDArray[Any]:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        file = self._files[number]
        part = _read(file)
        if number and (part.dtype, part.shape[1]) != (self.dtype, self.shape[1]):
            raise MmembedError(
                f"{file}: {part.shape[1]} columns of {part.dtype}, the first file has {self.shape[1]} of {self.dtype}; "
                "keep the files of one collection in a folder"
            )
        self._kept[number] = part
        if len(self._kept) > KEPT[file.suffix]:
            self._kept.popitem(last=False)
        return part


def write_table(path: Path, ids: list[str], vectors: NDArray[Any]) -> None:
    """Writes a file of `ids` and `vectors` (n, W); the suffix of its name says which kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    table = pa.table({ID: pa.array(ids, pa.string()), VECTOR: lists})
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=max(1, len(ids)))
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(ids)))


def _rows_of(file: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
    except (OSError, pa.ArrowInvalid) as error:
        raise MmembedError(f"{file}: not a readable table ({error}); write it again with `mmembed encode`") from error


def _read(file: Path) -> NDArray[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = (
            pq.read_table(file, columns=[VECTOR])
            if file.suffix == ".parquet"
            else pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        )
        lists = table[VECTOR].combine_chunks() if table[VECTOR].num_chunks != 1 else table[VECTOR].chunk(0)
        width = lists.type.list_size
        return np.asarray(lists.flatten().to_numpy(zero_copy_only=True)).reshape(-1, width)  # (n, W)
    except (OSError, KeyError, AttributeError, pa.ArrowInvalid) as error:
        raise MmembedError(f"{file}: not a table of vectors ({error}); write it again with `mmembed encode`") from error
