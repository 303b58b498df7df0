"""A source as a stream of examples, and what could not be read of it.

A record is read as training reads it: through its format, with the source's instruction and task, its pictures below
the folders that training would open. What training would refuse, or skip, is counted by kind here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.content import Example
from mmembed.data.dataset import base_folder, locate, media_store, settle
from mmembed.data.format_base import FORMATS, RawRecord
from mmembed.data.records import parse_document, parse_record
from mmembed.errors import ConfigError, RecordError
from mmembed.progress import bar

SHOWN = 5  # bad records of a kind


@dataclass
class Bad:
    """Records that cannot be used."""

    kinds: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: RecordError) -> None:
        self.kinds[error.kind] += 1
        if self.kinds[error.kind] <= SHOWN:
            self.shown.setdefault(error.kind, []).append(f"{error.where}: {error.found}")


class Reading:
    """One source of a run.

    Attributes:
        raw: its records are raw documents, without queries.
        media: opens its pictures.
        bad: what was not usable so far.
    """

    def __init__(self, source: SourceConfig, data: DataConfig) -> None:
        self.source = source
        self.path = locate(source, data.root)
        self._reader = FORMATS.build({"type": source.format, **source.options})
        self.raw = self._reader.raw
        self.media = media_store(data)
        self._base = base_folder(self.path, self.media)
        self.bad = Bad()

    def examples(self) -> Iterator[Example]:
        """The usable records, in order. Of a raw document `documents` is empty, and its content stands as `query`.

        Raises:
            ConfigError: the source as a whole cannot be read, or holds nothing at all.
        """
        found = 0
        with bar(f"read {self.path}", None, " records") as shown:
            for record in self._reader.read(self.path):
                found += 1
                shown.update()
                if isinstance(record, RecordError):
                    self.bad.add(record)
                    continue
                try:
                    yield self._example(record)
                except RecordError as error:
                    self.bad.add(error)
        if not found:
            raise ConfigError(f"{self.path}: holds no record; look at the path, the format and its options")

    def _example(self, record: RawRecord) -> Example:
        settled, where = settle(record, self.source, self._base), record["where"]
        return parse_document(settled, where) if self.raw else parse_record(settled, where)
