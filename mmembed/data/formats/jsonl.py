"""Canonical JSON lines: one record a line, as `mmembed.data.records` describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mmembed.data.format_base import COMPRESSED, Format, RawRecord, read_json_lines
from mmembed.errors import ConfigError, RecordError


class JsonLines(Format):
    """A `.jsonl` file of canonical records, or a folder of them; also compressed (`.jsonl.gz`, `.jsonl.zst`)."""

    name: ClassVar[str] = "jsonl"
    streamable: ClassVar[bool] = True

    def files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        names = tuple(f".jsonl{ending}" for ending in ("", *COMPRESSED))
        return sorted(file for file in path.rglob("*.jsonl*") if file.name.endswith(names))

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        files = self.files(path)
        if not files:
            raise ConfigError(f"{path}: the folder holds no .jsonl file; give the folder with the records")
        for file in files:
            for where, row in read_json_lines(file):
                yield row if isinstance(row, RecordError) else {**row, "where": where}
