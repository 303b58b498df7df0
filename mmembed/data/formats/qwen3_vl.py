"""Inputs of Qwen3-VL-Embedding: a content and its instruction a row, without documents.

    {"text": "...", "image": "a.png", "video": ["frame-1.png"], "instruction": "...", "fps": 1.0, "max_frames": 64}

As a source they are raw documents, of which pairs are made; as those are of text, a row with media is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds
from mmembed.data.rows import Number, Row, RowFormat, Schema, content_of, fields_of, put
from mmembed.errors import RecordError


class Shown(TypedDict):
    text: NotRequired[str | None]
    image: NotRequired[str | Annotated[list[str], MinLen(1)] | None]
    video: NotRequired[Annotated[list[str], MinLen(1)] | None]


class Fields(Shown):
    instruction: NotRequired[str | None]
    fps: NotRequired[Number | None]
    max_frames: NotRequired[int | None]


class Qwen3VL(RowFormat):
    """Inputs of Qwen3-VL-Embedding: `text`, `image`, `video`, `instruction`, `fps`, `max_frames`."""

    name: ClassVar[str] = "qwen3_vl"
    raw: ClassVar[bool] = True
    schema: ClassVar[Schema] = Schema(Fields, meta=["fps", "max_frames"])
    holds: Holds = Holds(
        record=frozenset({"instruction", "meta"}),
        media=frozenset({"image", "video"}),
        pictures=None,
        documents=False,
        unjudged=frozenset({"queries"}),
    )

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for record in super().read(path):
            if isinstance(record, RecordError):
                yield record
            elif isinstance(record["query"], str):
                yield {key: value for key, value in record.items() if key not in ("documents", "meta")}
            else:
                yield RecordError(record["where"], "has media", "Leave it out: pairs are made of texts", "not a text")

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return first is not None and super().looks_like(path, first) and first.keys() <= Fields.__annotations__.keys()

    def record(self, row: Row, where: str) -> RawRecord:
        content = shown(row, "the row", where)
        record: RawRecord = {"query": content, "documents": [], "where": where}
        return put(record, instruction=row.get("instruction"), meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        row = put(as_shown(record["query"]), instruction=record.get("instruction"))
        return self.schema.with_extras(row, record, record["where"])


def shown(row: Mapping[str, Any], key: str, where: str) -> Any:
    """The content of `text`, `image`, `video`. Raises RecordError where there is none of them."""
    image = row.get("image")
    several = {"images": image} if isinstance(image, list) else {}
    content = content_of(row.get("text"), None if several else image, video=row.get("video"), **several)
    if content == "":
        raise RecordError(where, f"{key} has no text, image or video", "Add one, or remove the line", "empty text")
    return content


def as_shown(content: Any) -> Row:
    fields = fields_of(content)
    if "images" in fields:
        fields["image"] = fields.pop("images")
    return fields
