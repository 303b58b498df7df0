"""The canonical record: one JSON object for every task, parsed strictly and written back without loss.

    {"query": "a red bus", "documents": [{"content": {"image": "bus.jpg"}}, {"content": "a train", "relevance": 0}]}

A content is a string, a mapping of `text`, `image`, `images`, `video`, `audio` (+ `sampling_rate`), or a list
of those when the order of the parts matters. What cannot be right is an error with file, line and remedy; a key that is
not known is an error as well, because a misspelt `relevancy` would silently make a negative a positive.

A document may hold its `title` apart, as files of other toolkits do: it is read as title and text joined by a space.
`meta` of a record and of a document is an object of anything: where a text comes from, fields that only another format
has. The data tools keep it; no model reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmembed.content import (
    Audio,
    Content,
    Document,
    Example,
    Image,
    Part,
    Task,
    Text,
    Video,
    lone_surrogate,
    to_content,
)
from mmembed.errors import MmembedError, RecordError, nearest

STS_POSITIVE = 0.8  # 4 of 5: what NV-Embed (arXiv 2405.17428) takes for a positive pair
RECORD_KEYS = ("query", "documents", "instruction", "task", "source", "id", "labels", "meta")
DOCUMENT_KEYS = ("content", "title", "relevance", "score", "id", "rationale", "meta")


def parse_record(record: Mapping[str, Any], where: str) -> Example:
    """Reads one canonical record.

    Args:
        record: the object; a key `where` is passed over.
        where: `file:line`, for messages and for `Example.where`.

    Raises:
        RecordError: unknown or missing keys, texts that are empty or not Unicode, values of a wrong type or range, no
            positive document, or one that is a negative as well.
    """
    _known(record, (*RECORD_KEYS, "where"), where, "the record")
    for key in ("query", "documents"):
        if key not in record:
            raise RecordError(where, f"the record has no '{key}'", f"Add it; a record is {_SHAPE}", "missing key")
    _check_meta(record, "the record", where)
    task = _task(record.get("task"), where)
    query, instruction = record["query"], parse_string(record, "instruction", where)
    if isinstance(query, Mapping) and query.get("instruction") is not None:
        if instruction is not None:
            raise RecordError(where, "two instructions, of the record and of the query", "Keep one", "two instructions")
        instruction = parse_string(query, "instruction", where)
        query = {key: value for key, value in query.items() if key != "instruction"}
    documents = record["documents"]
    if not isinstance(documents, list) or not documents:
        raise RecordError(
            where, "'documents' is not a list with at least one entry", f"A record is {_SHAPE}", "no documents"
        )
    parsed = tuple(_document(item, f"documents[{i}]", where) for i, item in enumerate(documents))
    if task is not Task.STS and not any(document.relevance > 0 for document in parsed):
        raise RecordError(
            where, "no document has a relevance above 0", "Add a positive or remove the record", "no positive"
        )
    _unambiguous(parsed, where)
    return Example(
        query=parse_content(query, "query", where),
        documents=parsed,
        task=task,
        instruction=instruction,
        source=parse_string(record, "source", where) or "",
        id=parse_string(record, "id", where),
        where=where,
        labels=_labels(record["labels"], where) if "labels" in record else (),
    )


def parse_document(record: Mapping[str, Any], where: str) -> Example:
    """Reads one raw document, which pairs are made of: its content stands as `query`, and it has no documents.

    Raises:
        RecordError: unknown keys, a text that is empty, a value of a wrong type.
    """
    _known(record, ("query", "instruction", "task", "source", "id", "where"), where, "the document")
    return Example(
        query=parse_content(record["query"], "the document", where),
        documents=(),
        task=_task(record.get("task"), where),
        instruction=parse_string(record, "instruction", where),
        source=parse_string(record, "source", where) or "",
        id=parse_string(record, "id", where),
        where=where,
    )


def parse_content(value: Any, key: str, where: str) -> Content:
    """Reads the content that `key` of a record holds.

    Raises:
        RecordError: it is unreadable, or has a text that is empty or not Unicode.
    """
    try:
        content = to_content(value)
    except MmembedError as error:
        raise RecordError(where, f"{key}: {error}", "Correct or remove the record", "unreadable content") from None
    for part in content:
        for text in (part.text,) if isinstance(part, Text) else _references(part):
            check_unicode(text, key, where)
        if isinstance(part, Text) and not part.text.strip():
            raise RecordError(where, f"{key} has an empty text", "Remove the key 'text', or the record", "empty text")
    return content


def parse_string(item: Mapping[str, Any], key: str, where: str) -> str | None:
    """item[key]; None where it is missing. Raises RecordError: it is no string, or not Unicode."""
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(
            where, f"'{key}' is a {type(value).__name__}", "Give a string or remove the key", "not a string"
        )
    if value is not None:
        check_unicode(value, f"'{key}'", where)
    return value


def check_unicode(text: str, key: str, where: str) -> None:
    """Raises RecordError where a text holds half a surrogate pair, as the JSON escape \\ud800 alone gives it."""
    lone = lone_surrogate(text)
    if lone is not None:
        found = f"{key} is not valid Unicode (a lone surrogate, {lone})"
        raise RecordError(where, found, "Correct or remove the text", "not Unicode")


def is_untrainable_pair(example: Example) -> bool:
    """Whether an STS record has a document that is neither a positive nor a negative, or no positive at all."""
    positives = [document.relevance for document in example.documents if document.relevance > 0]
    return example.task is Task.STS and min(positives, default=0.0) < STS_POSITIVE


def example_to_record(example: Example) -> dict[str, Any]:
    """The canonical record of an example; `parse_record` gives the example back.

    Raises:
        MmembedError: for pictures and sounds in memory: JSON holds paths only.
    """
    record: dict[str, Any] = {"query": content_to_json(example.query)}
    record["documents"] = [_document_to_json(document) for document in example.documents]
    if example.instruction is not None:
        record["instruction"] = example.instruction
    if example.task is not Task.RETRIEVAL:
        record["task"] = example.task.value
    if example.source:
        record["source"] = example.source
    if example.id is not None:
        record["id"] = example.id
    if example.labels:
        record["labels"] = [path[0] if len(path) == 1 else list(path) for path in example.labels]
    return record


def write_records(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes canonical JSON lines; returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example_to_record(example), ensure_ascii=False) + "\n")
            count += 1
    return count


def content_to_json(content: Content) -> Any:
    """A string, a mapping where its fixed order (media before text) is the content's order, else a list of mappings."""
    items = [_part_to_json(part) for part in content]
    if len(items) == 1:
        return content[0].text if isinstance(content[0], Text) else items[0]
    merged: dict[str, Any] = {}
    pictures = [part.source for part in content if isinstance(part, Image)]
    if len(pictures) > 1:
        merged["images"] = pictures
    for item in items:
        merged.update({key: value for key, value in item.items() if key != "image" or len(pictures) == 1})
    return merged if to_content(merged) == content else items


def resolve_media(content: Any, folder: Path) -> Any:
    """The JSON content with relative paths of pictures, frames and sounds put below `folder`."""
    if isinstance(content, list):
        return [resolve_media(item, folder) for item in content]
    if not isinstance(content, Mapping):
        return content
    return {key: _below(value, folder) if key in _MEDIA_KEYS else value for key, value in content.items()}


def without_media(content: Any, kinds: Collection[str]) -> Any:
    """The JSON content without its media of some kinds (`image`, `video`, `audio`); None where nothing is left."""
    if isinstance(content, list):
        left = [part for part in (without_media(item, kinds) for item in content) if part is not None]
        return left if left or not content else None
    left_out = {key for kind in kinds for key in _KEYS_OF_KIND[kind]}
    if not isinstance(content, Mapping) or not left_out & content.keys():
        return content
    kept = {key: value for key, value in content.items() if key not in left_out}
    return kept if any(value is not None for key, value in kept.items() if key != "instruction") else None


_KEYS_OF_KIND = {"image": ("image", "images"), "video": ("video",), "audio": ("audio", "sampling_rate")}
MEDIA_KINDS = tuple(_KEYS_OF_KIND)
_MEDIA_KEYS = ("image", "images", "video", "audio")
_SHAPE = '{"query": ..., "documents": [{"content": ..., "relevance": 1.0}, ...]}'


def _below(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_below(item, folder) for item in value]
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        return value
    return str(folder / value)


def _labels(value: Any, where: str) -> tuple[tuple[str, ...], ...]:
    """A list of labels, each a name or the names of its levels from the top down."""
    paths = [[label] if isinstance(label, str) else label for label in value] if isinstance(value, list) else []
    whole = all(isinstance(path, list) and path and all(isinstance(name, str) for name in path) for path in paths)
    if not paths or not whole or not all(name.strip() for path in paths for name in path):
        raise RecordError(
            where,
            f"'labels' is {value!r}",
            'Write a list of labels, each a name or a list of the names of its levels: ["hello", ["hotel", "book"]]; '
            "or remove the key",
            "bad labels",
        )
    for name in (name for path in paths for name in path):
        check_unicode(name, "a label", where)
    return tuple(tuple(path) for path in paths)


def _document(item: Any, key: str, where: str) -> Document:
    if not isinstance(item, Mapping):
        raise RecordError(
            where, f"{key} is a {type(item).__name__}", 'Write {"content": ..., "relevance": 1.0}', "not a document"
        )
    if "content" not in item:
        raise RecordError(where, f"{key} has no 'content'", 'Write {"content": ..., "relevance": 1.0}', "missing key")
    _known(item, DOCUMENT_KEYS, where, key)
    if isinstance(item["content"], Mapping) and item["content"].get("instruction") is not None:
        raise RecordError(
            where, f"{key} carries an instruction", "Set document_instruction of the source instead", "two instructions"
        )
    relevance = _number(item.get("relevance", 1.0), f"{key}.relevance", where)
    if relevance < 0:
        raise RecordError(
            where, f"{key}.relevance is {relevance}", "Use 0 for a negative, above 0 for a positive", "bad number"
        )
    score = None if item.get("score") is None else _number(item["score"], f"{key}.score", where)
    rationale = parse_string(item, "rationale", where)
    if rationale is not None and not rationale.strip():
        raise RecordError(where, f"{key}.rationale is empty", "Write one, or remove the key", "empty text")
    _check_meta(item, key, where)
    content = parse_content(with_title(item, key, where), key, where)
    return Document(content, relevance, score, parse_string(item, "id", where), rationale)


def with_title(document: Mapping[str, Any], key: str, where: str) -> Any:
    """The JSON content of a document with its title in front of its text, as a model reads it.

    Raises:
        RecordError: the title is no string, or the content is a list, in which nothing says where a title belongs.
    """
    title, content = parse_string(document, "title", where), document["content"]
    if title is None or not title.strip():
        return content
    if isinstance(content, str):
        return f"{title} {content}" if content.strip() else title
    if not isinstance(content, Mapping):
        found = f"{key} has a title, and its content is a {type(content).__name__}"
        raise RecordError(where, found, "Put the title into the list", "title of a list")
    text = content.get("text")
    return {**content, "text": f"{title} {text}" if isinstance(text, str) and text.strip() else title}


def _check_meta(item: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(item.get("meta", {}), Mapping):
        found = f"'meta' of {key} is a {type(item['meta']).__name__}"
        raise RecordError(where, found, 'Write an object, {"origin": "..."}, or remove the key', "bad meta")


def _references(medium: Image | Video | Audio) -> list[str]:
    """Its paths and URLs."""
    media = medium.frames if isinstance(medium, Video) else (medium,)
    return [one.source for one in media if isinstance(one.source, str)]


def _unambiguous(documents: Sequence[Document], where: str) -> None:
    """Raises RecordError where a content, or an id, is both a positive and a negative of the query."""
    negatives = [document for document in documents if document.relevance == 0]
    if not negatives or len(negatives) == len(documents):
        return
    ids = {document.id for document in negatives} - {None}
    try:
        contents = {document.content for document in negatives}
        for index, one in enumerate(documents):
            if one.relevance > 0 and (one.id in ids or one.content in contents):
                what = "id" if one.id in ids else "content"
                found = f"documents[{index}] is a positive, and its {what} is that of a negative as well"
                raise RecordError(where, found, "Keep the one that is right", "positive and negative")
    except TypeError:  # media in memory, which have no hash and which no file has
        return


def _known(item: Mapping[str, Any], keys: tuple[str, ...], where: str, what: str) -> None:
    for key in item:
        if key not in keys:
            raise RecordError(
                where, f"{what} has an unknown key '{key}'", nearest(key, keys).capitalize(), "unknown key"
            )


def _task(value: Any, where: str) -> Task:
    names = [task.value for task in Task]
    if value is None:
        return Task.RETRIEVAL
    if value not in names:
        raise RecordError(where, f"unknown task '{value}'", nearest(str(value), names).capitalize(), "unknown task")
    return Task(value)


def _number(value: Any, key: str, where: str) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float's range
        pass
    raise RecordError(where, f"{key} is {value!r:.80}", "Give a finite number", "bad number")


def _document_to_json(document: Document) -> dict[str, Any]:
    item: dict[str, Any] = {"content": content_to_json(document.content)}
    if document.relevance != 1.0:
        item["relevance"] = document.relevance
    if document.score is not None:
        item["score"] = document.score
    if document.id is not None:
        item["id"] = document.id
    if document.rationale is not None:
        item["rationale"] = document.rationale
    return item


def _part_to_json(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"text": part.text}
    if isinstance(part, Image):
        return {"image": _path(part.source)}
    if isinstance(part, Video):
        return {"video": [_path(frame.source) for frame in part.frames]}
    sound: dict[str, Any] = {"audio": _path(part.source)}
    return sound if part.sampling_rate is None else {**sound, "sampling_rate": part.sampling_rate}


def _path(source: Any) -> str:
    if not isinstance(source, str):
        raise MmembedError(
            f"records: a {type(source).__name__} in memory cannot be written as JSON; save it and give its path"
        )
    return source
