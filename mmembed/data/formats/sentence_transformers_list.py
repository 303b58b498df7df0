"""sentence-transformers' labelled lists: a query, its documents, and a label of each, for rerankers.

    {"query": "...", "docs": ["...", "..."], "labels": [1, 0]}

Names of the columns are free but for the label's; labels are graded relevances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmembed.data.format_base import RawRecord
from mmembed.data.formats.sentence_transformers import (
    LABELS,
    Fields,
    check_number,
    columns_as_they_were,
    columns_of,
    content_in,
    same_columns,
)
from mmembed.data.holding import Holds, with_spelling
from mmembed.data.rows import Row, RowFormat, Schema, write_rows
from mmembed.errors import RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore

NAMES = ["query", "docs", "labels"]


class SentenceTransformersList(RowFormat):
    """Labelled lists of sentence-transformers: a query, a list of documents, a list of labels."""

    name: ClassVar[str] = "sentence_transformers_list"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        relevance="graded", media=frozenset({"image", "video", "audio"}), positives=(0, None), ordered=True
    )

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        values = [value for name, value in (first or {}).items() if name not in LABELS]
        return len(values) == 2 and len(first or {}) == 3 and isinstance(values[1], list)

    def check(self, row: Row, where: str) -> None:
        contents, label = columns_of(row, where)
        if len(contents) != 2 or label is None:
            found = f"has the columns {', '.join(row)}"
            raise RecordError(where, found, "Write a query, a list of documents, and labels", "missing field")
        documents, labels = row[contents[1]], row[label]
        for key, value in ((contents[1], documents), (label, labels)):
            if not isinstance(value, list) or not value:
                raise RecordError(where, f"{key} is {value!r:.80}", "Give a list with at least one entry", "bad field")
        if len(documents) != len(labels):
            found = f"{label} has {len(labels)} entries, {contents[1]} has {len(documents)}"
            raise RecordError(where, found, "Give a label for each document", "bad field")
        content_in(row[contents[0]], contents[0], where)
        for place, (document, number) in enumerate(zip(documents, labels, strict=True)):
            content_in(document, f"{contents[1]}[{place}]", where)
            check_number(number, f"{label}[{place}]", where)
            if number < 0:
                remedy = "Use 0 for a negative, above 0 for a positive"
                raise RecordError(where, f"{label}[{place}] is {number}", remedy, "bad number")

    def record(self, row: Row, where: str) -> RawRecord:
        (query, many), label = columns_of(row, where)
        documents = [
            {"content": content_in(one, many, where), "relevance": number}
            for one, number in zip(row[many], row[label or ""], strict=True)
        ]
        record = {"query": content_in(row[query], query, where), "documents": documents, "where": where}
        return record if list(row) == NAMES else with_spelling(self.name, record, columns=list(row))

    def row(self, record: RawRecord) -> Row:
        documents = record["documents"]
        values = iter([record["query"], [one["content"] for one in documents]])
        labels = [one.get("relevance", 1) for one in documents]
        names = columns_as_they_were(self.name, record, NAMES)
        return {name: labels if name in LABELS else next(values) for name in names}

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        write_rows(path, same_columns(self.row_as_it_was, records))
