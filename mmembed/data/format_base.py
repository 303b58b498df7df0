"""What a reader of a file format has to provide, and where readers are found.

A format turns the files of one data source into canonical records (see `mmembed.data.records`), one at a time and in
constant memory: it is read once, into the memory-mapped cache of `RecordDataset`. A bad record is *yielded* as a
RecordError, not raised: a generator that raised is over, and `on_bad_record: skip` must go on with the next line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from mmembed.errors import ConfigError, RecordError, nearest
from mmembed.registry import Registry

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
RawRecord = dict[str, Any]  # a canonical record, and "where": "file:line"


class Format:
    """Base of all formats. The constructor's arguments are the format's options."""

    name: ClassVar[str]
    streamable: ClassVar[bool] = False  # whether each of `files` can be given to `read` by itself
    raw: ClassVar[bool] = False  # its records are raw documents (`parse_document`), of which pairs are made

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        """Yields the records of the source at `path` in file order.

        Raises:
            ConfigError: when the source as a whole cannot be read (no such file, a column that is not there).
        """
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        """The files that `read` depends on; the cache is rebuilt when one of them changes."""
        return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


FORMATS: Registry[Format] = Registry("mmembed.data.formats", Format)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(`file:line`, object) of each non-blank line; a line that is not one JSON object comes as a RecordError."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                yield where, RecordError(where, f"not valid JSON ({error})", "Correct or remove the line", "not JSON")
                continue
            if isinstance(value, dict):
                yield where, value
            else:
                found = f"a JSON {type(value).__name__}, not an object"
                yield where, RecordError(where, found, "Write one {...} object a line", "not JSON")


def _opened(path: Path) -> BinaryIO:
    if existing(path).suffix not in COMPRESSED:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), buffer_size=2**20))


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Raises ConfigError where a compressed file is broken or cut short."""
    if path.suffix not in COMPRESSED:
        yield from file
        return
    try:
        yield from file
    except (OSError, ValueError) as error:  # Arrow's errors are of both kinds
        raise ConfigError(f"{path}: not a readable {path.suffix} file ({error}); restore it") from error


def existing(path: Path) -> Path:
    """The path itself. Raises ConfigError when there is no such file, naming the nearest one beside it."""
    if path.is_file():
        return path
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else "its folder does not exist either"
    raise ConfigError(f"{path}: there is no such file; {hint}")


def column(row: dict[str, Any], name: str, where: str) -> Any:
    """row[name]. Raises RecordError naming the nearest key of the row."""
    if name not in row:
        raise RecordError(where, f"there is no '{name}'", nearest(name, row).capitalize(), "missing key")
    return row[name]
