"""Language models that write: a file each. `type` of a config's `generator` is the name.

A generator takes requests and gives futures, so the caller keeps as many in flight as the engine can use and takes
answers in whatever order they come. What a generator retries by itself is transport: a busy server, a broken
connection, a server that died. Whether a text is a usable answer is the caller's to judge, and so is asking again with
another seed. The constructor's arguments are the options of the block; nothing is loaded before `start`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmembed.errors import MmembedError
from mmembed.media import MediaStore
from mmembed.registry import Registry

Message = Mapping[
    str, Any
]  # {"role", "content": str, or [{"type": "text", "text"}, {"type": "image", "image": source}]}
Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, under the names that vLLM and OpenAI-compatible servers share.

    max_tokens: of one answer.
    seed: None lets the engine choose; a request with a seed has one answer where the engine is deterministic.
    stop: texts that end an answer, and are no part of it.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One question.

    key: names it in messages.
    messages: a chat; pictures are sources that a `MediaStore` opens.
    schema: a JSON schema that the answer has to satisfy; None for free text.
    """

    key: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """One answer.

    finish: `stop` by itself, `length` at max_tokens, `refused` by a filter of the server.
    prompt_tokens, tokens: as the engine counts them.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int


class GeneratorDown(MmembedError):
    """The generator does not answer any more, whatever is asked: no server, no engine, a key that is refused."""


class RequestFailed(MmembedError):
    """This request has no answer, after all retries; others may have one. `kind` groups failures that are counted."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Generator:
    """Base of all.

    reads: the kinds of parts that it takes.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset({"text"})

    @property
    def capacity(self) -> int:
        """Requests in flight that keep it busy."""
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """What its answers depend on, as JSON: weights and settings, not where or how fast it runs. Read before
        anything is loaded.

        Raises MmembedError where there is no such model.
        """
        raise NotImplementedError

    def start(self, media: MediaStore) -> None:
        """Gets ready; `media` opens pictures. Raises GeneratorDown where it cannot."""
        raise NotImplementedError

    def submit(self, request: Request) -> Future[Answer]:
        """Asks; called by one thread. The future's exception is GeneratorDown or RequestFailed."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees the model, stops what `start` started. May be called twice, and without `start`."""


GENERATORS: Registry[Generator] = Registry("data_tools.generators", Generator)


def parts_of(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """All parts of all messages, texts as parts, too."""
    found: list[Mapping[str, Any]] = []
    for message in messages:
        content = message["content"]
        found += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return found
