"""Canonical JSON lines: one record a line, as `mmembed.data.records` describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmembed.data.format_base import RawRecord, WritableFormat
from mmembed.data.holding import DOCUMENT_FIELDS, MEDIA, RECORD_FIELDS, Holds
from mmembed.data.rows import json_lines_of, read_files, write_rows
from mmembed.errors import RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore


class JsonLines(WritableFormat):
    """A `.jsonl` file of canonical records, or a folder of them; also compressed (`.jsonl.gz`, `.jsonl.zst`)."""

    name: ClassVar[str] = "jsonl"
    streamable: ClassVar[bool] = True
    holds: Holds = Holds(
        record=frozenset(RECORD_FIELDS),
        document=frozenset(DOCUMENT_FIELDS),
        relevance="any",
        media=frozenset(MEDIA),
        pictures=None,
        interleaved="any",
        sampling_rate=True,
        positives=(0, None),
        ordered=True,
    )

    def files(self, path: Path) -> list[Path]:
        return json_lines_of(path)

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_files(path):
            yield row if isinstance(row, RecordError) else {**row, "where": where}

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_files(path):
            yield row if isinstance(row, RecordError) else _complete(row, where)

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        write_rows(path, ({key: value for key, value in record.items() if key != "where"} for record in records))

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        documents = (first or {}).get("documents")
        return isinstance(documents, list) and all(isinstance(one, dict) and "content" in one for one in documents)


def _complete(row: dict[str, Any], where: str) -> RawRecord | RecordError:
    """The record; or that it lacks a side, and would be taken for what nobody judged."""
    for key in ("query", "documents"):
        if not row.get(key):
            return RecordError(where, f"the record has no '{key}'", "Add it, or remove the line", "missing key")
    if "where" in row:
        return RecordError(where, "the record has an unknown key 'where'", "Put it into meta", "unknown key")
    return {**row, "where": where}
