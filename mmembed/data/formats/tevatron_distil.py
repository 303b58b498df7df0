"""Tevatron's rows for distillation: passages with a teacher's scores, of which the first is the positive.

{"query_id": "q1", "query": "...", "passages": [{"title": "...", "text": "..."}], "scores": [0.9]}
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, positives_first
from mmembed.data.rows import Number, Row, RowFormat, Schema, Words, plain_text, put
from mmembed.errors import RecordError


class Passage(TypedDict):
    docid: NotRequired[str | None]
    title: NotRequired[str | None]
    text: str


class Fields(TypedDict):
    query_id: NotRequired[str | None]
    query: Words
    passages: Annotated[list[Passage], MinLen(1)]
    scores: list[Number]


class TevatronDistil(RowFormat):
    """Rows of Tevatron for distillation: `query_id`, `query`, `passages`, `scores`."""

    name: ClassVar[str] = "tevatron_distil"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "title", "score", "meta"}),
        positives=(1, 1),
        scores="all",
        needs=frozenset({"score"}),
    )
    passage: ClassVar[Schema] = Schema(Passage)

    def record(self, row: Row, where: str) -> RawRecord:
        passages, scores = row["passages"], row["scores"]
        if len(passages) != len(scores):
            found = f"scores has {len(scores)} entries, passages has {len(passages)}"
            raise RecordError(where, found, "Give one score a passage, in the same order", "bad field")
        documents = []
        for place, (one, score) in enumerate(zip(passages, scores, strict=True)):
            document = put({"content": one["text"]}, title=one.get("title"), id=one.get("docid"), score=score)
            documents.append(put(document, relevance=0 if place else None, meta=self.passage.extras(one)))
        record = {"query": row["query"], "documents": documents, "where": where}
        return put(record, id=row.get("query_id"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        passages, where = [], record["where"]
        documents = positives_first(record["documents"])
        for one in documents:
            fields = put({}, docid=one.get("id"), title=one.get("title"), text=plain_text(one["content"]))
            passages.append(self.passage.with_extras(fields, one, where))
        row = put({"query": plain_text(record["query"])}, query_id=record.get("id"))
        scores = [one["score"] for one in documents]
        return self.schema.with_extras({**row, "passages": passages, "scores": scores}, record, where)
