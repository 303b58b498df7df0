"""Tevatron's older rows: a query with its passages, texts and titles in place.

{"query_id": "q1", "query": "...", "positive_passages": [{"docid": "d1", "title": "...", "text": "..."}],
 "negative_passages": []}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Row, RowFormat, Schema, Words, known_ids, plain_text, put


class Passage(TypedDict):
    docid: str
    title: NotRequired[str | None]
    text: str


class Fields(TypedDict):
    query_id: NotRequired[str | None]
    query: Words
    positive_passages: Annotated[list[Passage], MinLen(1)]
    negative_passages: NotRequired[list[Passage] | None]


class TevatronLegacy(RowFormat):
    """Rows of Tevatron before its corpora: `query_id`, `query`, `positive_passages`, `negative_passages`."""

    name: ClassVar[str] = "tevatron_legacy"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "title", "meta"}),
        needs=frozenset({"documents.id"}),
    )
    passage: ClassVar[Schema] = Schema(Passage)

    def record(self, row: Row, where: str) -> RawRecord:
        documents = [self._document(one, None) for one in row["positive_passages"]]
        documents += [self._document(one, 0) for one in row.get("negative_passages") or []]
        record = {"query": row["query"], "documents": documents, "where": where}
        return put(record, id=row.get("query_id"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        where, both = record["where"], sides(record["documents"])
        ids = iter(known_ids({**record, "documents": both[0] + both[1]}))
        row = put({"query": plain_text(record["query"])}, query_id=record.get("id"))
        for side, documents in zip(("positive_passages", "negative_passages"), both, strict=True):
            row[side] = []
            for one in documents:
                fields = put({"docid": next(ids)}, title=one.get("title"), text=plain_text(one["content"]))
                row[side].append(self.passage.with_extras(fields, one, where))
        return self.schema.with_extras(row, record, where)

    def _document(self, passage: Row, relevance: int | None) -> dict[str, Any]:
        document = {"content": passage["text"], "id": passage["docid"]}
        return put(document, title=passage.get("title"), relevance=relevance, meta=self.passage.extras(passage))
