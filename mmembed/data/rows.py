"""What formats of JSON rows share: a row's schema, checked by line and field, extra fields, and rows that come back.

A row is described by a TypedDict. It checks what is read (`file:line: pos[2] is 3. ...`), tells the format's own fields
from others, which become `meta`, and is what the tests draw rows from. Costs about 2 us a row to check; reading for a
conversion also writes the row again, to see whether it comes back as it was.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, ClassVar, get_type_hints

from annotated_types import Predicate
from pydantic import TypeAdapter, ValidationError

from mmembed.content import Image, Text, to_content
from mmembed.data.format_base import COMPRESSED, RawRecord, WritableFormat, existing, read_json_lines, read_object
from mmembed.data.holding import meta_of, normal, respelled, spell
from mmembed.data.records import content_to_json
from mmembed.errors import ConfigError, RecordError, nearest

if TYPE_CHECKING:
    from mmembed.media import MediaStore

Row = dict[str, Any]


def not_blank(text: str) -> bool:
    return bool(text.strip())


Words = Annotated[str, Predicate(not_blank)]  # a text that says something
Number = Annotated[float, Predicate(math.isfinite)]

_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


class Schema:
    """The fields of a row, of a TypedDict.

    Args:
        meta: those of them that a record has no field for: they become `meta`, as other fields do.
    """

    def __init__(self, row: type, meta: Iterable[str] = ()) -> None:
        self.row = row
        self.keys = frozenset(get_type_hints(row)) - frozenset(meta)
        self._adapter: TypeAdapter[Any] = TypeAdapter(row)

    def check(self, row: Row, where: str) -> None:
        """Raises RecordError: a field that is missing (the nearest one named), or of a wrong type."""
        try:
            self._adapter.validate_python(row, strict=True)
        except ValidationError as error:
            raise self._explained(error, row, where) from None

    def takes(self, row: Row) -> bool:
        try:
            self.check(row, "")
        except RecordError:
            return False
        return True

    def extras(self, row: Row) -> dict[str, Any]:
        """Fields that are not the format's own: what becomes `meta`."""
        return {key: value for key, value in row.items() if key not in self.keys}

    def with_extras(self, row: Row, item: Mapping[str, Any], where: str) -> Row:
        """The row with a record's or a document's `meta` as fields of their own."""
        meta = meta_of(item)
        for key in meta.keys() & self.keys:
            remedy = "Rename it there, or leave meta out with --drop"
            raise RecordError(where, f"'meta' has '{key}', which is a field of the format", remedy, "field taken")
        return {**row, **meta}

    def _explained(self, error: ValidationError, row: Row, where: str) -> RecordError:
        def deepest(one: Any) -> tuple[int, bool]:
            """Of the branches of a union the one that fits best: its error lies deepest, or its type is right."""
            return len(_path(one["loc"], row)[0]), one["type"] == "predicate_failed"

        first = max(error.errors(), key=deepest)
        path, value = _path(first["loc"], row)
        if first["type"] == "missing":
            name = str(first["loc"][-1])
            inside = f"{path} has" if path else "there is"
            others = sorted(key for key in (value if isinstance(value, Mapping) else row) if isinstance(key, str))
            hint = nearest(name, others).capitalize() if others else "Add it"
            return RecordError(where, f"{inside} no '{name}'", hint, "missing field")
        remedy = _REMEDIES.get(first["type"]) or first["msg"].replace("Input should", "It should")
        if first["type"] == "predicate_failed" and isinstance(value, int | float):
            remedy = "Give a finite number"
        if "video" in path and isinstance(value, str):
            remedy = "Give the list of its frames: a video is read as pictures"
        return RecordError(where, f"{path or 'the row'} is {value!r:.80}", remedy, "bad field")


_REMEDIES = {"predicate_failed": "Write a text that is not empty", "too_short": "Give at least one entry"}


def _path(loc: Iterable[int | str], row: Any) -> tuple[str, Any]:
    """`pos[2].text` and what stands there; names of the branches of a union are passed over."""
    path, value = "", row
    for step in loc:
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, Mapping) and step in value:
            path, value = f"{path}.{step}" if path else str(step), value[step]
    return path, value


class RowFormat(WritableFormat):
    """JSON lines, a record a row, or a folder of such files; also compressed (`.gz`, `.bz2`, `.zst`, `.lz4`)."""

    schema: ClassVar[Schema]
    streamable: ClassVar[bool] = True

    def check(self, row: Row, where: str) -> None:
        """Raises RecordError where a field is missing or of a wrong type."""
        self.schema.check(row, where)

    def record(self, row: Row, where: str) -> RawRecord:
        """The record of a checked row. Raises RecordError where fields do not fit together."""
        raise NotImplementedError

    def row(self, record: RawRecord) -> Row:
        """The row of a record that the format holds."""
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        return json_lines_of(path)

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        return self._records(path, whole=False)

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        return self._records(path, whole=True)

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        write_rows(path, (self.row_as_it_was(record) for record in records))

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return first is not None and cls.schema.takes(dict(first))

    def record_as_it_is(self, row: Row, where: str) -> RawRecord:
        """The record, from which `row_as_it_was` makes this very row."""
        record = self.record(row, where)
        return spell(self.name, record, row, self.row(record))

    def row_as_it_was(self, record: RawRecord) -> Row:
        def still_says(row: Row) -> bool:
            self.check(row, record["where"])
            return normal(self.record(row, record["where"]), self.holds.ordered) == normal(record, self.holds.ordered)

        return respelled(self.name, record, self.row(record), still_says)

    def _records(self, path: Path, whole: bool) -> Iterator[RawRecord | RecordError]:
        for where, row in read_files(path):
            try:
                if isinstance(row, RecordError):
                    raise row
                self.check(row, where)
                yield self.record_as_it_is(row, where) if whole else self.record(row, where)
            except RecordError as error:
                yield error


def json_lines_of(path: Path) -> list[Path]:
    """The file itself, or all that lie below a folder."""
    if not path.is_dir():
        return [path]
    names = tuple(f".jsonl{ending}" for ending in ("", *COMPRESSED))
    return sorted(file for file in path.rglob("*.jsonl*") if file.name.endswith(names))


def read_files(path: Path) -> Iterator[tuple[str, Row | RecordError]]:
    """(`file:line`, object) of all lines of `json_lines_of`. Raises ConfigError where a folder has no file."""
    files = json_lines_of(path)
    if not files:
        raise ConfigError(f"{path}: the folder holds no .jsonl file; give the folder with the records")
    for file in files:
        yield from read_json_lines(file)


def read_rows(path: Path, schema: Schema) -> Iterator[tuple[str, Row | RecordError]]:
    """(`file:line`, checked row) of each line of a file; a bad one comes as a RecordError."""
    for where, row in read_json_lines(path):
        try:
            if isinstance(row, RecordError):
                raise row
            schema.check(row, where)
            yield where, row
        except RecordError as error:
            yield where, error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with writing(path) as file:
        for row in rows:
            file.write(line_of(row))


def line_of(row: Row) -> bytes:
    return _ENCODE(row).encode() + b"\n"


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in COMPRESSED:
        with path.open("wb") as file:
            yield file
        return
    import pyarrow as pa

    with pa.output_stream(str(path)) as stream, io.BufferedWriter(stream, 2**20) as buffered:
        yield buffered


def read_object_file(path: Path) -> Row:
    """A file that is one JSON object. Raises ConfigError."""
    try:
        return read_object(existing(path).read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
    except RecordError as error:
        raise ConfigError(str(error)) from None


def plain_text(content: Any) -> str:
    """Of a content that is one text."""
    if isinstance(content, str):
        return content
    (part,) = to_content(content)
    assert isinstance(part, Text), "a format of texts was given media"
    return part.text


def fields_of(content: Any) -> dict[str, Any]:
    """A content, media before text, as a mapping of `text`, `image` or `images`, `video`, `audio`, `sampling_rate`."""
    plain = content_to_json(to_content(content))
    return {"text": plain} if isinstance(plain, str) else dict(plain)


def content_of(text: str | None, image: str | None = None, **others: Any) -> Any:
    """A content of what is there: a text alone is a string."""
    media = {key: value for key, value in (("image", image), *others.items()) if value}
    if not media:
        return text or ""
    return {**media, "text": text} if text else media


def pictures_of(content: Any) -> list[str]:
    return [part.source for part in to_content(content) if isinstance(part, Image) and isinstance(part.source, str)]


def put(item: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """With the fields that are not None, and a `meta` that is not empty."""
    given = {key: value for key, value in fields.items() if value is not None}
    if not given.get("meta", True):
        del given["meta"]
    return {**item, **given}


def known_ids(record: Mapping[str, Any]) -> list[str]:
    """Of the documents, made where they are missing. Raises RecordError where two have the same one."""
    ids = [made_id(one) if one.get("id") is None else str(one["id"]) for one in record["documents"]]
    for place, name in enumerate(ids if len(set(ids)) < len(ids) else []):
        if name in ids[:place]:
            found = f"documents[{place}] is the document '{name}' once more"
            raise RecordError(record["where"], found, "Remove one, or give it an id of its own", "repeated id")
    return ids


def made_id(document: Mapping[str, Any]) -> str:
    """For a document that has none: of what it says, so that equal documents share it."""
    said = {key: document.get(key) for key in ("content", "title", "meta") if document.get(key)}
    return f"d-{hashlib.blake2b(_ENCODE(said).encode(), digest_size=8).hexdigest()}"
