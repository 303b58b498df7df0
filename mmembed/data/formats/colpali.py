"""ColPali's rows: a query, its page or pages, and pages that do not answer it.

    {"query": "...", "pos_target": {"image": "page.png"}, "neg_target": ["a text", {"image": "other.png"}]}

A target is a text, or a mapping that names a picture; several are a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, sides
from mmembed.data.rows import Row, RowFormat, Schema, Words, content_of, fields_of, put
from mmembed.errors import RecordError


class Page(TypedDict):
    image: Words
    text: NotRequired[Words | None]


Target = Words | Page


class Fields(TypedDict):
    query: Target
    pos_target: Target | Annotated[list[Target], MinLen(1)]
    neg_target: NotRequired[Target | list[Target] | None]


class ColPali(RowFormat):
    """Rows of ColPali: `query`, `pos_target`, `neg_target`."""

    name: ClassVar[str] = "colpali"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(record=frozenset({"meta"}), media=frozenset({"image"}))

    def record(self, row: Row, where: str) -> RawRecord:
        query = target(row["query"], "query", where)
        documents = [{"content": one} for one in _several(row["pos_target"], "pos_target", where)]
        documents += [{"content": one, "relevance": 0} for one in _several(row.get("neg_target"), "neg_target", where)]
        return put({"query": query, "documents": documents, "where": where}, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        positives, negatives = ([as_target(one["content"]) for one in side] for side in sides(record["documents"]))
        row = {"query": as_target(record["query"]), "pos_target": positives if len(positives) > 1 else positives[0]}
        return self.schema.with_extras({**row, "neg_target": negatives}, record, record["where"])


def _several(value: Any, key: str, where: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list):
        return [target(one, f"{key}[{place}]", where) for place, one in enumerate(value)]
    return [target(value, key, where)]


def target(value: Any, key: str, where: str) -> Any:
    """The content of a target. Raises RecordError where it has keys that nobody knows."""
    if isinstance(value, str):
        return value
    for name in value:
        if name not in Page.__annotations__:
            raise RecordError(where, f"{key} has an unknown key '{name}'", "Write 'image' or 'text'", "unknown field")
    return content_of(value.get("text"), value["image"])


def as_target(content: Any) -> str | Mapping[str, Any]:
    fields = fields_of(content)
    return fields if "image" in fields else fields["text"]
