"""FlagEmbedding's rows: a query with lists of positives and negatives, scores of a teacher, and a prompt.

    {"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [0.9], "neg_scores": [0.1], "prompt": "...",
     "type": "..."}

The prompt is the record's instruction. A folder whose name ends in `no_in_batch_neg` switches in-batch negatives off
there; here the source says it (`in_batch_negatives: false`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Number, Row, RowFormat, Schema, Words, plain_text, put
from mmembed.errors import RecordError


class Fields(TypedDict):
    query: Words
    pos: Annotated[list[Words], MinLen(1)]
    neg: NotRequired[list[Words] | None]
    pos_scores: NotRequired[list[Number] | None]
    neg_scores: NotRequired[list[Number] | None]
    prompt: NotRequired[str | None]
    type: NotRequired[str | None]


class FlagEmbedding(RowFormat):
    """Rows of FlagEmbedding: `query`, `pos`, `neg`, `pos_scores`, `neg_scores`, `prompt`."""

    name: ClassVar[str] = "flag_embedding"
    schema: ClassVar[Schema] = Schema(Fields, meta=["type"])
    holds: Holds = Holds(record=frozenset({"instruction", "meta"}), document=frozenset({"score"}), scores="side")

    def record(self, row: Row, where: str) -> RawRecord:
        documents = [
            put({"content": text}, relevance=relevance, score=score)
            for side, relevance in (("pos", None), ("neg", 0))
            for text, score in zip(row.get(side) or [], scores_of(row, side, where), strict=True)
        ]
        record = {"query": row["query"], "documents": documents, "where": where}
        return put(record, instruction=row.get("prompt"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        row: Row = {"query": plain_text(record["query"])}
        both = sides(record["documents"])
        for side, documents in zip(("pos", "neg"), both, strict=True):
            row[side] = [plain_text(document["content"]) for document in documents]
        for side, documents in zip(("pos", "neg"), both, strict=True):
            if documents and documents[0].get("score") is not None:
                row[f"{side}_scores"] = [document["score"] for document in documents]
        return self.schema.with_extras(put(row, prompt=record.get("instruction")), record, record["where"])


def scores_of(row: Row, side: str, where: str) -> list[float | None]:
    """A score or None for each document of a side. Raises RecordError where their numbers differ."""
    documents, scores = row.get(side) or [], row.get(f"{side}_scores")
    if scores is None:
        return [None] * len(documents)
    if len(scores) != len(documents):
        found = f"{side}_scores has {len(scores)} entries, {side} has {len(documents)}"
        raise RecordError(where, found, "Give one score a document, in the same order", "bad field")
    return list(scores)
