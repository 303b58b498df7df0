"""NeMo AutoModel's rows with the documents in place.

    {"query": "...", "pos_doc": "..." or ["..."], "neg_doc": "..." or ["..."]}

The query may be called `question`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Row, RowFormat, Schema, Words, plain_text, put
from mmembed.errors import RecordError


class Fields(TypedDict):
    query: NotRequired[Words | None]
    question: NotRequired[Words | None]
    pos_doc: Words | Annotated[list[Words], MinLen(1)]
    neg_doc: NotRequired[Words | list[Words] | None]


class NeMo(RowFormat):
    """Rows of NeMo: `query` or `question`, `pos_doc`, `neg_doc`."""

    name: ClassVar[str] = "nemo"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(record=frozenset({"meta"}))

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        if (row.get("query") is None) == (row.get("question") is None):
            found = "there is no 'query' and no 'question'" if row.get("query") is None else "'query' and 'question'"
            raise RecordError(where, found, "Write one of them", "missing field")

    def record(self, row: Row, where: str) -> RawRecord:
        documents: list[Row] = [{"content": text} for text in _several(row["pos_doc"])]
        documents += [{"content": text, "relevance": 0} for text in _several(row.get("neg_doc"))]
        query = row["question"] if row.get("query") is None else row["query"]
        return put({"query": query, "documents": documents, "where": where}, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        row: Row = {"query": plain_text(record["query"])}
        for side, documents in zip(("pos_doc", "neg_doc"), sides(record["documents"]), strict=True):
            row[side] = [plain_text(document["content"]) for document in documents]
        return self.schema.with_extras(row, record, record["where"])


def _several(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value
