"""Content parts and examples: what flows through mmembed from a file to a tensor.

A Content is a tuple of parts (text, image, video frames, audio). Media are references until they are used: nothing here
opens a file. This module knows nothing of tensors, tokenizers or file formats (readers live in `mmembed.data.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmembed.errors import MmembedError, nearest

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

Role = Literal["query", "document"]


class Task(StrEnum):
    """What an example's labels mean; objectives and evaluation choose by it."""

    RETRIEVAL = "retrieval"
    STS = "sts"
    CLASSIFICATION = "classification"
    CLUSTERING = "clustering"
    RERANKING = "reranking"


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """One picture: a path, encoded bytes, a PIL image, or `table.parquet#image_id` (a row of a parquet table)."""

    source: str | bytes | PIL.Image.Image


@dataclass(frozen=True, slots=True)
class Video:
    """Frames in order; how densely they were sampled is the caller's choice."""

    frames: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Audio:
    """A mono waveform: a path to a sound file, or samples (T,) in [-1, 1] at `sampling_rate` Hz."""

    source: str | np.ndarray
    sampling_rate: int | None = None


Part = Text | Image | Video | Audio
Content = tuple[Part, ...]
ContentLike = Any  # str, PIL image, one part, a sequence of parts, or {"text", "image", "images", "video", "audio"}
CONTENT_KEYS = ("text", "image", "images", "video", "audio", "sampling_rate", "instruction")


@dataclass(frozen=True, slots=True)
class Document:
    """A candidate of one query. `relevance` is graded: above 0 is a positive, 0 is a labelled negative.

    `score` is an optional teacher or retriever score, in the teacher's own units; `rationale` says why it is relevant
    or not.
    """

    content: Content
    relevance: float = 1.0
    score: float | None = None
    id: str | None = None
    rationale: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation record.

    `labels` are paths in trees of labels, from the top level down, that the query and its positives have in common; of
    a plain label the path is the label alone. `where` is `file:line` of its origin, for error messages; `visit` is how
    often a run has drawn it before; `domain` conditions the routers of a mixture of experts.
    """

    query: Content
    documents: tuple[Document, ...]
    task: Task = Task.RETRIEVAL
    instruction: str | None = None
    source: str = ""
    id: str | None = None
    where: str = ""
    visit: int = 0
    labels: tuple[tuple[str, ...], ...] = ()
    domain: str | None = None


def to_content(value: ContentLike) -> Content:
    """Reads what users naturally write as content.

    A str is one text. A mapping may hold `text`, `image` (or `images`, a list), `video` (a list of frames)
    and `audio` (with `sampling_rate`); media come before the text, as chat models are trained. A sequence is a
    sequence of parts in the given order. `instruction` in a mapping is left to the caller.

    Raises:
        MmembedError: on an unknown key, an unknown type, or no part at all.
    """
    if isinstance(value, str):
        return (Text(value),)
    if isinstance(value, Text | Image | Video | Audio):
        return (value,)
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if _is_picture(value) or isinstance(value, bytes | Path):
        return (_to_image(value),)
    if isinstance(value, Sequence):
        parts = tuple(part for item in value for part in to_content(item))
        if not parts:
            raise MmembedError("content: an empty list has nothing to embed; give at least one text or medium")
        return parts
    raise MmembedError(
        f"content: cannot read a {type(value).__name__}; give a str, a PIL image, a mapping with "
        f"{', '.join(CONTENT_KEYS[:-1])}, or a list of those"
    )


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone, escaped: no encoding and no tokenizer takes such a text."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return ascii(text[error.start])[1:-1]
    return None


def _from_mapping(value: Mapping[str, Any]) -> Content:
    for key in value:
        if key not in CONTENT_KEYS:
            raise MmembedError(f"content: unknown key '{key}'; {nearest(key, CONTENT_KEYS)}")
    given = {key: item for key, item in value.items() if item is not None}
    if "sampling_rate" in given and "audio" not in given:
        raise MmembedError("content: 'sampling_rate' describes 'audio', which is not there; remove it")
    parts: list[Part] = [_to_image(given["image"])] if "image" in given else []
    parts += _to_images("images", given["images"]) if "images" in given else []
    if "video" in given:
        parts.append(Video(_to_images("video", given["video"])))
    if "audio" in given:
        parts.append(_to_audio(given["audio"], given.get("sampling_rate")))
    if "text" in given:
        if not isinstance(given["text"], str):
            raise MmembedError(f"content: 'text' is a {type(given['text']).__name__}; give a str")
        parts.append(Text(given["text"]))
    if not parts:
        raise MmembedError("content: a mapping without text, image, video or audio has nothing to embed")
    return tuple(parts)


def _to_images(key: str, value: Any) -> tuple[Image, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        what = "the frames as a list of images" if key == "video" else "a list of images"
        raise MmembedError(f"content: '{key}' is a {type(value).__name__}; give {what}")
    if not value:
        raise MmembedError(f"content: '{key}' is an empty list; remove the key, or give at least one image")
    return tuple(_to_image(item) for item in value)


def _to_audio(value: Any, sampling_rate: Any) -> Audio:
    rate = _positive("sampling_rate", sampling_rate)
    if isinstance(value, Audio):
        return value
    if isinstance(value, str | Path):
        return Audio(str(value), None if rate is None else int(rate))
    if type(value).__module__ == "numpy" and value.ndim == 1:
        if rate is None:
            raise MmembedError("content: audio samples without 'sampling_rate'; give it in Hz")
        return Audio(value, int(rate))
    raise MmembedError(
        f"content: cannot read a {type(value).__name__} as audio; give a path or a one-dimensional numpy array"
    )


def _positive(key: str, value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    if value is not None and not number:
        raise MmembedError(f"content: '{key}' is {value!r:.80}; give a number above 0")
    return value


def _to_image(value: Any) -> Image:
    if isinstance(value, Image):
        return value
    if isinstance(value, Path):
        return Image(str(value))
    if isinstance(value, str | bytes) or _is_picture(value):
        return Image(value)
    raise MmembedError(
        f"content: cannot read a {type(value).__name__} as an image; give a path, encoded bytes or a PIL image"
    )


def _is_picture(value: Any) -> bool:
    """Whether this is a PIL image, without importing PIL."""
    return any(base.__module__.startswith("PIL.") for base in type(value).__mro__[:-1])
