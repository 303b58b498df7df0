"""GritLM's rows: FlagEmbedding's, where a text may be a pair of an instruction and the text.

    {"query": ["Find the answer", "..."], "pos": [["", "..."]], "neg": ["..."]}

A query's instruction is the record's. A document's is kept in its `meta` (`instruction`): in mmembed documents have one
instruction a source, `document_instruction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import Len, MinLen, Predicate
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Row, RowFormat, Schema, Words, not_blank, plain_text, put


def says_something(told: list[str]) -> bool:
    return not_blank(told[-1])


Told = Words | Annotated[list[str], Len(2, 2), Predicate(says_something)]  # a text, or [instruction, text]


class Fields(TypedDict):
    query: Told
    pos: Annotated[list[Told], MinLen(1)]
    neg: NotRequired[list[Told] | None]


class GritLM(RowFormat):
    """Rows of GritLM: `query`, `pos`, `neg`, each text alone or as `[instruction, text]`."""

    name: ClassVar[str] = "gritlm"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(record=frozenset({"instruction", "meta"}), document_meta=frozenset({"instruction"}))

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        if first is None or not super().looks_like(path, first):
            return False
        texts = [first["query"], *first["pos"], *(first.get("neg") or [])]
        return any(isinstance(text, list) for text in texts)  # else it is FlagEmbedding's

    def record(self, row: Row, where: str) -> RawRecord:
        documents = []
        for side, relevance in (("pos", None), ("neg", 0)):
            for told in row.get(side) or []:
                instruction, text = _apart(told)
                meta = None if instruction is None else {"instruction": instruction}
                documents.append(put({"content": text}, relevance=relevance, meta=meta))
        instruction, query = _apart(row["query"])
        record = {"query": query, "documents": documents, "where": where}
        return put(record, instruction=instruction, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        row: Row = {"query": _together(record.get("instruction"), record["query"])}
        for side, documents in zip(("pos", "neg"), sides(record["documents"]), strict=True):
            row[side] = [_together((one.get("meta") or {}).get("instruction"), one["content"]) for one in documents]
        return self.schema.with_extras(row, record, record["where"])


def _apart(told: str | list[str]) -> tuple[str | None, str]:
    return (None, told) if isinstance(told, str) else (told[0], told[1])


def _together(instruction: str | None, content: Any) -> str | list[str]:
    text = plain_text(content)
    return text if instruction is None else [instruction, text]
