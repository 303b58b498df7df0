"""Queries and relevant documents of a data set that a stage is to stay away from, or to come near to.

squad-en                  a BEIR folder: the queries that `split` judges, and their relevant documents
dev.jsonl                 records: queries and positives; or lines of content (a corpus.jsonl, a queries.jsonl)
photographs/              a folder of pictures
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from data_tools.files import stamps
from data_tools.synthesis.sides import Side, is_positive
from mmembed.data.format_base import FORMATS, read_json_lines
from mmembed.data.records import parse_record, resolve_media, with_title
from mmembed.errors import ConfigError, RecordError
from mmembed.inference.sources import media_root, read_entries
from mmembed.media import MediaStore
from mmembed.media_limits import MediaLimits

_NEVER = "no split"


class EvaluationSet(BaseModel):
    """A data set. split: of a BEIR folder; None takes test, or dev where there is no test. name: in reports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    split: str | None = None
    name: str | None = None


class Entry(NamedTuple):
    """A content of a set. side: None of a line that is neither."""

    side: Side | None
    id: str
    content: Any


class Opened:
    """A set whose files are there.

    Raises:
        ConfigError: they are not.
    """

    def __init__(self, stage: str, block: str | EvaluationSet, below_root: Callable[[str], Path]) -> None:
        given = EvaluationSet(path=block) if isinstance(block, str) else block
        self.path, self.name = below_root(given.path), given.name or given.path
        self.beir = (self.path / "queries.jsonl").is_file()
        if not self.path.exists():
            raise ConfigError(f"{stage}: there is no {self.path}; check the path, or set root")
        if given.split is not None and not self.beir:
            raise ConfigError(f"{stage}: {self.path} is no BEIR folder and has no split; remove 'split'")
        self.split = (given.split or self._usual(stage)) if self.beir else _NEVER
        if self.beir and not (self.path / "qrels" / f"{self.split}.tsv").is_file():
            known = sorted(one.stem for one in (self.path / "qrels").glob("*.tsv"))
            raise ConfigError(f"{stage}: {self.path} has no split '{self.split}'; it has {', '.join(known)}")

    def media(self, limits: MediaLimits) -> MediaStore:
        """Opens its pictures."""
        return MediaStore(None, limits, also=[media_root(self.path)])

    def stamps(self) -> list[Any]:
        """What tells that it has changed."""
        return [str(self.path), stamps([self.path])]

    def __iter__(self) -> Iterator[Entry]:
        """Its contents, each document once a query that it is relevant to. Raises RecordError for a bad line."""
        folder = media_root(self.path)
        if self.beir:
            yield from _of_records(FORMATS.build({"type": "beir", "split": self.split}).read(self.path), folder)
        elif self.path.is_file() and _holds_records(self.path):
            yield from _of_records(FORMATS.build("jsonl").read(self.path), folder)
        else:
            for entry in read_entries(self.path):
                if isinstance(entry, RecordError):
                    raise entry
                yield Entry(None, entry.id, resolve_media(entry.content, folder))

    def _usual(self, stage: str) -> str:
        for split in ("test", "dev"):
            if (self.path / "qrels" / f"{split}.tsv").is_file():
                return split
        raise ConfigError(f"{stage}: {self.path} has no qrels/test.tsv and no qrels/dev.tsv; name its split")


def _of_records(records: Iterator[Any], folder: Path) -> Iterator[Entry]:
    for record in records:
        if isinstance(record, RecordError):
            raise record
        where = record["where"]
        parse_record(record, where)
        yield Entry("query", str(record.get("id", where)), resolve_media(record["query"], folder))
        for document in filter(is_positive, record["documents"]):
            content = resolve_media(with_title(document, "a document", where), folder)
            yield Entry("document", str(document.get("id", where)), content)


def _holds_records(path: Path) -> bool:
    _, first = next(read_json_lines(path), ("", {}))
    return isinstance(first, dict) and "documents" in first
