"""VLM2Vec's rows, which are those of MMEB-train: texts beside paths, and a token where the picture belongs.

    {"qry": "<|image_1|>\\nWhat is this?", "qry_image_path": "images/a.png", "pos_text": "A bus.", "pos_image_path": "",
     "neg_text": "", "neg_image_path": ""}

Paths start at a folder that VLM2Vec is told by itself (`image_dir`): `data.media_root`, `--media-root` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NotRequired

from typing_extensions import TypedDict

from mmembed.content import Image, Text, to_content
from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, normal, sides
from mmembed.data.rows import Row, RowFormat, Schema, put
from mmembed.errors import RecordError

TOKEN = "<|image_1|>"


class Fields(TypedDict):
    qry: str
    qry_image_path: NotRequired[str | None]
    pos_text: str
    pos_image_path: NotRequired[str | None]
    neg_text: NotRequired[str | None]
    neg_image_path: NotRequired[str | None]


class VLM2Vec(RowFormat):
    """Rows of VLM2Vec: `qry`, `pos_text`, `neg_text`, and beside each the path of its picture."""

    name: ClassVar[str] = "vlm2vec"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"meta"}),
        media=frozenset({"image"}),
        interleaved="around",
        positives=(1, 1),
        negatives=(0, 1),
    )

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return super().looks_like(path, first) and not is_list((first or {}).get("neg_text"))  # else it is mmE5's

    def record(self, row: Row, where: str) -> RawRecord:
        query = _content(row["qry"], row.get("qry_image_path"), "qry", where)
        documents = [{"content": _content(row["pos_text"], row.get("pos_image_path"), "pos_text", where)}]
        for place, (text, image) in enumerate(self._negatives(row, where)):
            content = _content(text, image, f"neg_text[{place}]", where)
            documents.append({"content": content, "relevance": 0})
        return put({"query": query, "documents": documents, "where": where}, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        where = record["where"]
        (positive,), negatives = sides(record["documents"])
        row: Row = {}
        row["qry"], row["qry_image_path"] = _written(record["query"], "query", where)
        row["pos_text"], row["pos_image_path"] = _written(positive["content"], "the positive", where)
        row.update(self._written([_written(one["content"], "a negative", where) for one in negatives]))
        return self.schema.with_extras(row, record, where)

    def _negatives(self, row: Row, where: str) -> list[tuple[str, str]]:
        """(text, path) of each."""
        pair = row.get("neg_text") or "", row.get("neg_image_path") or ""
        return [pair] if any(one.strip() for one in pair) else []

    def _written(self, negatives: list[tuple[str, str]]) -> Row:
        text, image = negatives[0] if negatives else ("", "")
        return {"neg_text": text, "neg_image_path": image}


def is_list(value: Any) -> bool:
    """Whether a text is a list that is written as a string."""
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")


def _content(text: str, image: str | None, key: str, where: str) -> Any:
    """What a text and a path say."""
    if not (image or "").strip():
        if not text.strip():
            raise RecordError(where, f"{key} is empty, and there is no picture", "Write one of them", "empty text")
        if TOKEN in text:
            raise RecordError(where, f"{key} has {TOKEN}, and there is no picture", "Give its path", "bad field")
        return text
    if text.count(TOKEN) > 1:
        raise RecordError(where, f"{key} has {TOKEN} twice, and one picture", "Keep one", "bad field")
    before, _, after = text.partition(TOKEN)
    if TOKEN in text and before.strip():
        return [before, {"image": image}, *([after] if after.strip() else [])]
    rest = after.removeprefix("\n") if TOKEN in text else before
    return {"image": image, "text": rest} if rest.strip() else {"image": image}


def _written(content: Any, key: str, where: str) -> tuple[str, str]:
    """The text, with the token where the picture is, and its path. Raises RecordError where that would be read
    otherwise: the text has such a token already."""
    parts = to_content(content)
    image = next((str(part.source) for part in parts if isinstance(part, Image)), "")
    text = "".join(part.text if isinstance(part, Text) else TOKEN for part in parts)
    if len(parts) > 1 and isinstance(parts[0], Image):
        text = f"{TOKEN}\n{text.removeprefix(TOKEN)}"
    if text.count(TOKEN) != bool(image) or normal({"query": _content(text, image, key, where)}) != normal(
        {"query": content}
    ):
        found = f"{key} cannot be written with the token {TOKEN}"
        raise RecordError(where, found, "Remove such a token from its text", "field taken")
    return text, image
