"""Canonical JSON lines: one record a line, as `mmembed.data.records` describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mmembed.data.format_base import Format, RawRecord, read_json_lines
from mmembed.errors import RecordError


class JsonLines(Format):
    """A `.jsonl` file of canonical records."""

    name: ClassVar[str] = "jsonl"

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_json_lines(path):
            yield row if isinstance(row, RecordError) else {**row, "where": where}
