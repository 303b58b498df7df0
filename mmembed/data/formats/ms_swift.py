"""ms-swift's rows for embedding: chat messages of the query, of its positives and negatives, and their media.

    {"messages": [{"role": "user", "content": "<image>What is this?"}], "images": ["a.png"],
     "positive_messages": [[{"role": "user", "content": "A bus."}]], "negative_messages": [], "label": 0.8}

Each tag `<image>`, `<video>`, `<audio>` takes the next of its medium; media without a tag come first. A system message
of the query is the record's instruction; a document's stands in its `meta` (`system`), as does a role that is not the
usual one (`role`). A label is the similarity of the query and one document (task `sts`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.content import Audio, Image, Text, Video, to_content
from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, normal, sides
from mmembed.data.records import content_to_json
from mmembed.data.rows import Number, Row, RowFormat, Schema, put
from mmembed.errors import RecordError

KINDS = {"image": "images", "video": "videos", "audio": "audios"}  # a tag -> the list that it takes from
_TAG = re.compile(r"<(image|video|audio)>")
_TURNS = "Write one user turn, at most a system message before it: that is what is embedded"


class Message(TypedDict):
    role: str
    content: str


Chat = Annotated[list[Message], MinLen(1)]
Frames = Annotated[list[str], MinLen(1)]


class Fields(TypedDict):
    messages: Chat
    images: NotRequired[list[str] | None]
    videos: NotRequired[list[Frames] | None]
    audios: NotRequired[list[str] | None]
    positive_messages: Annotated[list[Chat], MinLen(1)]
    positive_images: NotRequired[list[list[str]] | None]
    positive_videos: NotRequired[list[list[Frames]] | None]
    positive_audios: NotRequired[list[list[str]] | None]
    negative_messages: NotRequired[list[Chat] | None]
    negative_images: NotRequired[list[list[str]] | None]
    negative_videos: NotRequired[list[list[Frames]] | None]
    negative_audios: NotRequired[list[list[str]] | None]
    label: NotRequired[Number | None]


class MsSwift(RowFormat):
    """Rows of ms-swift for embedding: `messages`, `positive_messages`, `negative_messages`, their media, `label`."""

    name: ClassVar[str] = "ms_swift"
    schema: ClassVar[Schema] = Schema(Fields)
    holds: Holds = Holds(
        record=frozenset({"instruction", "meta"}),
        document_meta=frozenset({"role", "system"}),
        sts=True,
        media=frozenset(KINDS),
        pictures=None,
        interleaved="around",
    )
    role: ClassVar[str] = "user"  # of a document

    @classmethod
    def looks_like(cls, path: Any, first: Mapping[str, Any] | None) -> bool:
        return super().looks_like(path, first) and _role_of(first or {}) == cls.role

    def record(self, row: Row, where: str) -> RawRecord:
        media = {kind: row.get(many) or [] for kind, many in KINDS.items()}
        query, role, instruction = _read(row["messages"], media, "messages", where)
        if role != "user":
            raise RecordError(where, f"messages has the role '{role}'", _TURNS, "bad field")
        documents = [document for side in ("positive", "negative") for document in self._documents(row, side, where)]
        record = put({"query": query, "documents": documents, "where": where}, instruction=instruction)
        if (label := row.get("label")) is not None:
            if len(documents) != 1 or not label >= 0:
                found = f"label is {label} of {len(documents)} documents"
                raise RecordError(where, found, "A label is a similarity, not below 0, to one positive", "bad field")
            record["task"] = "sts"
            documents[0]["relevance"] = label
        return put(record, meta=self.schema.extras(row))

    def row(self, record: RawRecord) -> Row:
        where = record["where"]
        row = _written("", [(record["query"], "user", record.get("instruction"))], where)
        row = {key: value[0] for key, value in row.items()}
        pair = record.get("task") == "sts"
        both = (record["documents"], []) if pair else sides(record["documents"])
        for side, documents in zip(("positive_", "negative_"), both, strict=True):
            turns = [self._turn(document) for document in documents]
            row.update(_written(side, turns, where) if turns else {f"{side}messages": []})
        label = record["documents"][0].get("relevance", 1) if pair else None
        return self.schema.with_extras(put(row, label=label), record, where)

    def _documents(self, row: Row, side: str, where: str) -> list[dict[str, Any]]:
        chats = row.get(f"{side}_messages") or []
        lists = {kind: row.get(f"{side}_{many}") or [[] for _ in chats] for kind, many in KINDS.items()}
        for kind, listed in lists.items():
            if len(listed) != len(chats):
                found = f"{side}_{KINDS[kind]} has {len(listed)} entries, {side}_messages has {len(chats)}"
                raise RecordError(where, found, "Give a list for each, an empty one where it has none", "bad field")
        documents = []
        for place, chat in enumerate(chats):
            media = {kind: listed[place] for kind, listed in lists.items()}
            content, role, system = _read(chat, media, f"{side}_messages[{place}]", where)
            meta = put({}, role=None if role == self.role else role, system=system)
            documents.append(put({"content": content}, relevance=None if side == "positive" else 0, meta=meta))
        return documents

    def _turn(self, document: Mapping[str, Any]) -> tuple[Any, str, str | None]:
        meta = document.get("meta") or {}
        return document["content"], meta.get("role", self.role), meta.get("system")


def _role_of(row: Mapping[str, Any]) -> str:
    """Of the first positive."""
    chats = row.get("positive_messages") or [[{"role": "user"}]]
    return str(chats[0][-1]["role"])


def _read(chat: list[Row], media: Mapping[str, list[Any]], key: str, where: str) -> tuple[Any, str, str | None]:
    """The content of a chat, its role, and its system message."""
    system = chat[0]["content"] if len(chat) > 1 and chat[0]["role"] == "system" else None
    turns = chat[1:] if system is not None else chat
    for message in chat:
        if message.keys() != {"role", "content"}:
            unknown = min(message.keys() - {"role", "content"})
            raise RecordError(where, f"{key} has an unknown key '{unknown}'", "Remove it", "unknown field")
    if len(turns) != 1 or turns[0]["role"] not in ("user", "assistant"):
        found = f"{key} has the roles {', '.join(message['role'] for message in chat)}"
        raise RecordError(where, found, _TURNS, "bad field")
    return _untagged(turns[0]["content"], media, key, where), turns[0]["role"], system


def _untagged(text: str, media: Mapping[str, list[Any]], key: str, where: str) -> Any:
    pieces = _TAG.split(text)  # text, kind, text, kind, ..., text
    tags = pieces[1::2]
    parts: list[Any] = []
    queues = {}
    for kind, given in media.items():
        extra = len(given) - tags.count(kind)
        if extra < 0:
            found = f"{key} has {tags.count(kind)} tags <{kind}> and {len(given)} {KINDS[kind]}"
            raise RecordError(where, found, "Give a path for each tag", "bad field")
        parts += [{kind: one} for one in given[:extra]]
        queues[kind] = iter(given[extra:])
    for place, piece in enumerate(pieces):
        if place % 2:
            parts.append({piece: next(queues[piece])})
        elif piece.strip():
            parts.append(piece)
    if not parts:
        raise RecordError(where, f"{key} is empty", "Write a text, or add a picture", "empty text")
    return content_to_json(to_content(parts))


def _written(prefix: str, turns: list[tuple[Any, str, str | None]], where: str) -> Row:
    """The fields of one side: a chat and lists of media for each content."""
    row: Row = {f"{prefix}messages": []}
    media: dict[str, list[list[Any]]] = {kind: [] for kind in KINDS}
    for content, role, system in turns:
        parts = to_content(content)
        own: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for part in parts:
            if isinstance(part, Image | Audio):
                own[type(part).__name__.lower()].append(part.source)
            elif isinstance(part, Video):
                own["video"].append([frame.source for frame in part.frames])
        text = "".join(part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>" for part in parts)
        if len(_TAG.findall(text)) != sum(map(len, own.values())) or not _says(text, own, content, where):
            found = f"a text cannot be told from the tags <image>, <video>, <audio>: {text!r:.80}"
            raise RecordError(where, found, "Write the text in another way", "field taken")
        told = [] if system is None else [{"role": "system", "content": system}]
        row[f"{prefix}messages"].append([*told, {"role": role, "content": text}])
        for kind, given in own.items():
            media[kind].append(given)
    return row | {f"{prefix}{KINDS[kind]}": lists for kind, lists in media.items() if any(lists)}


def _says(text: str, media: Mapping[str, list[Any]], content: Any, where: str) -> bool:
    return normal({"query": _untagged(text, media, "", where)}) == normal({"query": content})
