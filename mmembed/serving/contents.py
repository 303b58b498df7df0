"""What a request asks, as contents of mmembed: texts in their order, pictures as bytes, instructions apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmembed.content import Content, Image, Role, Text
from mmembed.serving.limits import ServeLimits
from mmembed.serving.refusal import Refusal
from mmembed.serving.schemas import (
    EmbeddingsRequest,
    ImagePart,
    Message,
    Multimodal,
    Part,
    RerankRequest,
    TextPart,
)

Pictures = Mapping[str, bytes]  # the field of a picture in the request -> its encoded bytes


@dataclass(frozen=True)
class Entry:
    """One input, query or document.

    Attributes:
        where: its field in the request.
        parts: each with the field that it stands in.
        instruction: what it brings itself.
        side: what it says itself that it is.
    """

    where: str
    parts: tuple[tuple[str, Part], ...]
    instruction: str | None = None
    side: Role | None = None

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """(field, URL) of each."""
        return [(where, part.image_url.url) for where, part in self.parts if isinstance(part, ImagePart)]

    def content(self, pictures: Pictures) -> Content:
        """Parts without any text stand for nothing beside others, and alone are refused by who embeds them."""
        made = [
            Image(pictures[where]) if isinstance(part, ImagePart) else Text(part.text) for where, part in self.parts
        ]
        return tuple(part for part in made if not isinstance(part, Text) or part.text.strip()) or tuple(made)


def entries_of(asked: EmbeddingsRequest) -> list[Entry]:
    """The inputs of a request. Raises Refusal for a conversation that is not one input."""
    field = "input" if asked.input is not None else "messages"
    found = []
    for index, one in enumerate(asked.inputs):
        where = f"{field}.{index}"
        entry = _of_text(one, where) if isinstance(one, str) else _of_conversation(one, where)
        if entry.instruction is not None and asked.instruction is not None:
            raise Refusal(
                400, f"{where}: a system message is the instruction, and 'instruction' is another; give one", where
            )
        found.append(entry)
    return found


def judged_of(asked: RerankRequest) -> list[Entry]:
    """The query of a request, and its documents."""
    named: list[tuple[str, str | Multimodal]] = [("query", asked.query)]
    named += [(f"documents.{index}", one) for index, one in enumerate(asked.documents)]
    return [
        _of_text(one, where) if isinstance(one, str) else Entry(where, _placed(one.content, f"{where}.content"))
        for where, one in named
    ]


def side_of(entries: Sequence[Entry], asked: EmbeddingsRequest) -> Role:
    """Whether the inputs are queries or documents. Raises Refusal where they are both."""
    told = {entry.side for entry in entries if entry.side} | ({asked.prompt_name} if asked.prompt_name else set())
    sides: list[Role] = sorted(side for side in told if side)
    if len(sides) > 1:
        raise Refusal(400, "prompt_name: found queries and documents; send a request for each", "prompt_name")
    return sides[0] if sides else "document"


def check_size(entries: Sequence[Entry], limits: ServeLimits, instruction: str | None) -> None:
    """Raises Refusal (413) for what is more than a request may have."""
    for entry in entries:
        texts = [part.text for _, part in entry.parts if not isinstance(part, ImagePart)]
        length = sum(map(len, texts)) + len(entry.instruction or instruction or "")
        if length > limits.characters:
            raise Refusal(
                413,
                f"{entry.where}: {length} characters; the limit is {limits.characters}. Send a shorter text",
                entry.where,
            )
    count = sum(len(entry.pictures) for entry in entries)
    if count > limits.images:
        raise Refusal(413, f"{count} pictures; the limit of a request is {limits.images}. Send several requests")


def read_all(entries: Sequence[Entry], read: Callable[[str, str], bytes]) -> Pictures:
    """`read(field, url)` of every picture."""
    return {where: read(where, url) for entry in entries for where, url in entry.pictures}


def _of_text(text: str, where: str) -> Entry:
    return Entry(where, ((where, TextPart(type="text", text=text)),))


def _of_conversation(messages: Sequence[Message], where: str) -> Entry:
    """A user's turn is the content, a system's in front of it the instruction."""
    roles = [message.role for message in messages]
    if "system" in roles[1:] or len(roles) != 1 + (roles[:1] == ["system"]):
        found = ", ".join(roles) or "nobody"
        raise Refusal(
            400,
            f"{where}: turns of {found}; give one turn of user, query or document, which is embedded, and in front of "
            "it at most one of system, which is the instruction",
            where,
        )
    instruction = None
    if len(messages) == 2:
        parts = messages[0].content
        if any(isinstance(part, ImagePart) for part in parts):
            raise Refusal(400, f"{where}.0: an instruction is text; move the picture to the user's turn", where)
        instruction = "".join(part.text for part in parts if not isinstance(part, ImagePart)) or None
    *_, turn = messages
    side: Role | None = turn.role if turn.role in ("query", "document") else None
    return Entry(where, _placed(turn.content, f"{where}.{len(messages) - 1}.content"), instruction, side)


def _placed(parts: Sequence[Part], where: str) -> tuple[tuple[str, Part], ...]:
    return tuple((f"{where}.{place}", part) for place, part in enumerate(parts))
