"""LLM2Vec's rows of the public E5 data: a query, a positive and a hard negative, one file a task.

    {"query": "...", "positive": "...", "negative": "..."}

The instruction is not in the file: LLM2Vec has a table from file names to instructions. Here the source says it.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Row, RowFormat, Schema, Words, plain_text, put


class Fields(TypedDict):
    query: Words
    positive: Words
    negative: Words


class LLM2Vec(RowFormat):
    """Rows of LLM2Vec: `query`, `positive`, `negative`."""

    name: ClassVar[str] = "llm2vec"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(record=frozenset({"meta"}), positives=(1, 1), negatives=(1, 1))

    def record(self, row: Row, where: str) -> RawRecord:
        documents = [{"content": row["positive"]}, {"content": row["negative"], "relevance": 0}]
        return put({"query": row["query"], "documents": documents, "where": where}, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        (positive,), (negative,) = sides(record["documents"])
        texts = [plain_text(content) for content in (record["query"], positive["content"], negative["content"])]
        return self.schema.with_extras(dict(zip(Fields.__annotations__, texts, strict=True)), record, record["where"])
