"""Inputs of Qwen3-VL-Reranker: a query and documents to rank. Nothing says which of them are relevant.

{"instruction": "...", "query": {"text": "..."}, "documents": [{"image": "a.png"}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord, existing
from mmembed.data.formats.qwen3_vl import Shown, as_shown, shown
from mmembed.data.holding import Holds
from mmembed.data.rows import Row, RowFormat, Schema, put
from mmembed.errors import ConfigError, RecordError


class Fields(TypedDict):
    instruction: NotRequired[str | None]
    query: Shown
    documents: Annotated[list[Shown], MinLen(1)]


class Qwen3VLRerank(RowFormat):
    """Inputs of Qwen3-VL-Reranker: `instruction`, `query`, `documents`; to convert only, as none is judged."""

    name: ClassVar[str] = "qwen3_vl_rerank"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"instruction", "meta"}),
        document=frozenset({"meta"}),
        relevance="unknown",
        media=frozenset({"image", "video"}),
        pictures=None,
        ordered=True,
    )
    part: ClassVar[Schema] = Schema(Shown)

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        raise ConfigError(f"{existing(path)}: its documents are not judged, so nothing can be trained on them")

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        unknown = sorted(self.part.extras(row["query"]))
        if unknown:
            raise RecordError(where, f"query has an unknown key '{unknown[0]}'", "Remove it", "unknown field")
        if any("content" in one for one in row["documents"]):
            raise RecordError(
                where, "documents[0] has a 'content'", "This is a record of format jsonl", "unknown field"
            )

    def record(self, row: Row, where: str) -> RawRecord:
        documents = []
        for place, one in enumerate(row["documents"]):
            document = {"content": shown(one, f"documents[{place}]", where), "relevance": None}
            documents.append(put(document, meta=self.part.extras(one)))
        record = {"query": shown(row["query"], "query", where), "documents": documents, "where": where}
        return put(record, instruction=row.get("instruction"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        where = record["where"]
        row = put({}, instruction=record.get("instruction"), query=as_shown(record["query"]))
        row["documents"] = [self.part.with_extras(as_shown(one["content"]), one, where) for one in record["documents"]]
        return self.schema.with_extras(row, record, where)
