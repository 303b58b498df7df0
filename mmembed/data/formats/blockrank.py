"""BlockRank's rows: a query and its list of candidates in their order, and the ids of those that answer it.

{"query": "...", "query_id": "q1", "documents": [{"doc_id": "d1", "title": "...", "text": "..."}],
 "answer_ids": ["d1"]}
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, is_positive
from mmembed.data.rows import Row, RowFormat, Schema, Words, known_ids, plain_text, put
from mmembed.errors import RecordError


class Candidate(TypedDict):
    doc_id: str
    title: NotRequired[str | None]
    text: Words


class Fields(TypedDict):
    query: Words
    query_id: NotRequired[str | None]
    documents: Annotated[list[Candidate], MinLen(1)]
    answer_ids: list[str]


class BlockRank(RowFormat):
    """Rows of BlockRank: `query`, `query_id`, `documents` (`doc_id`, `title`, `text`), `answer_ids`."""

    name: ClassVar[str] = "blockrank"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "title", "meta"}),
        positives=(0, None),
        ordered=True,
        needs=frozenset({"documents.id"}),
    )
    candidate: ClassVar[Schema] = Schema(Candidate)

    def record(self, row: Row, where: str) -> RawRecord:
        answers, documents = set(row["answer_ids"]), []
        ids = {one["doc_id"] for one in row["documents"]}
        if len(ids) < len(row["documents"]) or len(answers) < len(row["answer_ids"]):
            raise RecordError(where, "an id stands twice in the list", "Keep one of them", "repeated id")
        if answers - ids:
            found = f"answer_ids has '{min(answers - ids)}', which is no doc_id of the list"
            raise RecordError(where, found, "Correct the id, or add the document", "missing document")
        for one in row["documents"]:
            document = {"content": one["text"], "id": one["doc_id"]}
            relevance = None if one["doc_id"] in answers else 0
            meta = self.candidate.extras(one)
            documents.append(put(document, title=one.get("title"), relevance=relevance, meta=meta))
        record = {"query": row["query"], "documents": documents, "where": where}
        return put(record, id=row.get("query_id"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        where, documents, answers = record["where"], [], list[str]()
        for one, name in zip(record["documents"], known_ids(record), strict=True):
            fields = put({"doc_id": name}, title=one.get("title"), text=plain_text(one["content"]))
            documents.append(self.candidate.with_extras(fields, one, where))
            answers += [name] if is_positive(one) else []
        row = put({"query": plain_text(record["query"])}, query_id=record.get("id"))
        return self.schema.with_extras({**row, "documents": documents, "answer_ids": answers}, record, where)
