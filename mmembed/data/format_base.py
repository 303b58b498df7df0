"""What a reader of a file format has to provide, and where readers are found.

A format turns the files of one data source into canonical records (see `mmembed.data.records`), one at a time and in
constant memory: it is read once, into the memory-mapped cache of `RecordDataset`. A bad record is *yielded* as a
RecordError, not raised: a generator that raised is over, and `on_bad_record: skip` must go on with the next line.

A `WritableFormat` is written too (`data_tools.convert`): it says what it can hold, and reads all that a file has.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from mmembed.data.holding import Holds
from mmembed.errors import ConfigError, RecordError, nearest
from mmembed.registry import Registry

if TYPE_CHECKING:
    from mmembed.media import MediaStore

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
DEEPEST = 100  # lists and objects within each other: far from Python's limit of recursion
NOT_UTF8 = "not UTF-8"
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


class WritableFormat(Format):
    """A format that is written as well. What it reads whole and writes again is the same file; so is a record that it
    writes and reads again, if it is one that it `holds`."""

    holds: Holds
    folder: ClassVar[bool] = False  # what is written is a folder
    copies_pictures: ClassVar[bool] = False  # into its own files: paths of records mean nothing there

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        """Yields everything that the files have: fields that training has no use for in `meta`, queries without
        documents (`documents` is empty) and documents without a query (there is no `query`).

        Raises:
            ConfigError: as `read`.
        """
        raise NotImplementedError

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        """Writes records that the format holds; one that it cannot write after all raises RecordError.

        Args:
            media: opens the pictures of the records, of a format that has them inside.
        """
        raise NotImplementedError

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        """Whether files at `path` may be of this format.

        Args:
            first: the first object of a file of JSON lines.
        """
        return False

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for record in self.read_whole(path):
            if isinstance(record, RecordError) or ("query" in record and record.get("documents")):
                yield record


FORMATS: Registry[Format] = Registry("mmembed.data.formats", Format)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(`file:line`, object) of each non-blank line; a line that is not one JSON object comes as a RecordError."""
    with opened(path) as file:
        for number, line in enumerate(lines_of(file, path), start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                yield where, read_object(line, where)
            except RecordError as error:
                yield where, error


def read_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises RecordError: it is no such thing, or says a key twice."""
    try:
        value = _DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except RecursionError:
        raise _too_deep(where) from None
    except _RepeatedKey as error:
        raise RecordError(where, f"the key '{error}' stands twice in one object", "Keep one", "repeated key") from None
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError) or b"\0" in line:  # NULs: UTF-16 or UTF-32
            raise RecordError(where, NOT_UTF8, "Convert the file, or correct the line", NOT_UTF8) from None
        found = f"not valid JSON ({error})"
        raise RecordError(where, found, "Correct or remove the line", "not JSON") from None
    if not isinstance(value, dict):
        found = f"a JSON {type(value).__name__}, not an object"
        raise RecordError(where, found, "Write one {...} object a line", "not JSON")
    if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(value) > DEEPEST:
        raise _too_deep(where)
    return value


class _RepeatedKey(ValueError):
    """The key."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unrepeated)  # kept: json.loads with a hook builds one at every call


def _too_deep(where: str) -> RecordError:
    found = f"lists or objects within each other, more than {DEEPEST} deep"
    return RecordError(where, found, "Correct or remove the line", "too deep")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth


def opened(path: Path) -> BinaryIO:
    """An existing file, unpacked where it is compressed."""
    if existing(path).suffix not in COMPRESSED:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), buffer_size=2**20))


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of an opened file. Raises ConfigError where a compressed file is broken or cut short."""
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
