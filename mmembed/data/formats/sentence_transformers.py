"""Columns of sentence-transformers: an anchor, a positive, negatives, and maybe a label. Their names are free.

    {"anchor": "...", "positive": {"image": "a.png"}, "negative_1": "...", "negative_2": "..."}
    {"sentence1": "...", "sentence2": "...", "score": 0.8}

Order says what a column is; `label`, `labels`, `score` and `scores` are labels. A number beside two columns is their
similarity (task `sts`), a list with a number a document is a teacher's scores, and a number beside more columns (the
margin of MarginMSE) is kept in `meta` (`margin`). A value is a text, a mapping that names a picture, or the one user
turn of a chat. Every row has the same columns, since a missing one would reach the loss as None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import TypedDict

from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, meta_of, positives_first, spelling_of, with_spelling
from mmembed.data.records import parse_content
from mmembed.data.rows import Row, RowFormat, Schema, put, write_rows
from mmembed.errors import RecordError
from mmembed.registry import Count

if TYPE_CHECKING:
    from mmembed.media import MediaStore

LABELS = ("label", "labels", "score", "scores")
COLUMNS = {"anchor", "positive", "negative", "sentence1", "sentence2", "sentence_A", "sentence_B", "premise"}
_KEYS = ("text", "image", "audio", "video")


class Fields(TypedDict):
    """Names are free: what is there is checked by hand."""


class SentenceTransformers(RowFormat):
    """Columns of sentence-transformers, in order: anchor, positive, negatives; a label where there is one.

    Args:
        negatives: of each record that is written; a conversion may drop further ones. None: as many as the first has.
    """

    name: ClassVar[str] = "sentence_transformers"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        document=frozenset({"score"}),
        meta=frozenset({"margin"}),
        sts=True,
        media=frozenset({"image", "video", "audio"}),
        positives=(1, 1),
        scores="all",
    )

    def __init__(self, negatives: Count | None = None) -> None:
        if negatives is not None:
            self.holds = dataclasses.replace(self.holds, negatives=(negatives, negatives))

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        names = [name for name in first or () if name not in LABELS]
        return len(names) > 1 and all(name in COLUMNS or name.startswith("negative_") for name in names)

    def check(self, row: Row, where: str) -> None:
        contents, label = columns_of(row, where)
        if len(contents) < 2:
            found = f"{len(contents)} column beside labels"
            raise RecordError(where, found, "Write an anchor and a positive at least", "missing field")
        for key in contents:
            if isinstance(row[key], list) and not _is_chat(row[key]):
                remedy = "Lists of documents and labels are the format sentence_transformers_list"
                raise RecordError(where, f"{key} is a list", remedy, "bad field")
            content_in(row[key], key, where)
        if label is not None:
            several = isinstance(row[label], list)
            for number in row[label] if several else [row[label]]:
                check_number(number, label, where)
            if several and len(row[label]) != len(contents) - 1:
                found = f"{label} has {len(row[label])} numbers, and there are {len(contents) - 1} documents"
                raise RecordError(where, found, "Give one a document", "bad field")
            if not several and len(contents) == 2 and row[label] < 0:
                found = f"{label} is {row[label]}"
                raise RecordError(where, found, "Scale similarities so that 0 is the least", "bad number")

    def record(self, row: Row, where: str) -> RawRecord:
        contents, label = columns_of(row, where)
        query, *values = (content_in(row[key], key, where) for key in contents)
        documents = [put({"content": value}, relevance=0 if place else None) for place, value in enumerate(values)]
        record: RawRecord = {"query": query, "documents": documents, "where": where}
        number = None if label is None else row[label]
        if isinstance(number, list):
            for document, score in zip(documents, number, strict=True):
                document["score"] = score
        elif number is not None and len(documents) == 1:
            record["task"] = "sts"
            documents[0]["relevance"] = number
        elif number is not None:
            record["meta"] = {"margin": number}
        names = list(row)
        return record if names == _names(len(documents), label) else with_spelling(self.name, record, columns=names)

    def row(self, record: RawRecord) -> Row:
        pair = record.get("task") == "sts"
        documents = record["documents"] if pair else positives_first(record["documents"])
        label = meta_of(record).get("margin")
        if pair:
            label = documents[0].get("relevance", 1)
        elif documents[0].get("score") is not None:
            label = [document["score"] for document in documents]
        if "margin" in meta_of(record) and (pair or len(documents) < 2 or isinstance(label, list)):
            found = "'meta.margin' beside another label, or without a negative"
            raise RecordError(record["where"], found, "Leave meta out with --drop", "field taken")
        values = [record["query"], *(document["content"] for document in documents)]
        names = _names(len(documents), None if label is None else "label")
        names = columns_as_they_were(self.name, record, names)
        given = iter(values)
        return {name: label if name in LABELS else next(given) for name in names}

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        write_rows(path, same_columns(self.row_as_it_was, records))


def same_columns(row_of: Any, records: Iterator[RawRecord]) -> Iterator[Row]:
    """The rows. Raises RecordError where one has other columns than the first."""
    first: list[str] | None = None
    for record in records:
        row = row_of(record)
        first = list(row) if first is None else first
        if list(row) != first:
            found = f"gives the columns {', '.join(row)}; the first record gave {', '.join(first)}"
            remedy = "Give all as many negatives (--to-options negatives=N --drop negatives), and a label all or none"
            raise RecordError(record["where"], found, remedy, "other columns")
        yield row


def columns_as_they_were(name: str, record: RawRecord, names: list[str]) -> list[str]:
    """The names that the record's file had for these columns."""
    spelled = spelling_of(name, record).get("columns")
    if not isinstance(spelled, list) or not all(isinstance(one, str) for one in spelled):
        return names
    alike = len(set(spelled)) == len(spelled) == len(names)
    labels = [sum(one in LABELS for one in some) for some in (spelled, names)]
    return spelled if alike and labels[0] == labels[1] else names


def columns_of(row: Row, where: str) -> tuple[list[str], str | None]:
    """The columns that are no label, and the one that is."""
    labels = [key for key in row if key in LABELS]
    if len(labels) > 1:
        raise RecordError(where, f"has the labels {' and '.join(labels)}", "Keep one of them", "bad field")
    return [key for key in row if key not in LABELS], labels[0] if labels else None


def check_number(value: Any, key: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(where, f"{key} is {value!r:.80}", "Give a finite number", "bad number")


def content_in(value: Any, key: str, where: str) -> Any:
    """A text, a mapping, or what the one user turn of a chat says."""
    content = _of_chat(value, key, where) if _is_chat(value) else value
    if isinstance(content, Mapping):
        unknown = [name for name in content if name not in _KEYS]
        if unknown:
            found = f"{key} has an unknown key '{unknown[0]}'"
            raise RecordError(where, found, f"Write {', '.join(_KEYS)}", "unknown field")
    elif not isinstance(content, str | list):
        raise RecordError(where, f"{key} is {value!r:.80}", "Write a text, or a mapping with 'image'", "bad field")
    parse_content(content, key, where)
    return content


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _of_chat(chat: list[Row], key: str, where: str) -> Any:
    content = chat[0].get("content") if len(chat) == 1 and chat[0]["role"] == "user" else None
    if isinstance(content, str):
        return content
    parts = [_part(one) for one in content] if isinstance(content, list) else []
    if not parts or None in parts:
        remedy = "Write one user turn; the chat of a backbone is made when it is trained"
        raise RecordError(where, f"{key} is a chat with other turns or parts", remedy, "bad field")
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def _part(part: Any) -> Any:
    """A mapping of one part of a chat's content; None where it is no such thing."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _KEYS or part.get(kind) is None:
        return None
    return {kind: part[kind]}


def _names(documents: int, label: str | None) -> list[str]:
    negatives = ["negative"] if documents == 2 else [f"negative_{place}" for place in range(1, documents)]
    return ["anchor", "positive", *negatives, *([] if label is None else ["label"])]
