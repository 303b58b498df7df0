"""Messages as OpenAI-compatible servers and vLLM's own chat interface take them: pictures as data URLs.

A picture that every reader shows alike goes as it is: JPEG or PNG, in RGB, not rotated by a tag. Any other is opened as
all of mmembed opens pictures (rotated, transparency on white) and goes as PNG, so a model sees what a tuned one will.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import PIL.Image

from data_tools.generators import Message, RequestFailed
from mmembed.content import Image
from mmembed.errors import MediaError
from mmembed.media import MediaStore


def to_wire(messages: tuple[Message, ...], media: MediaStore) -> list[dict[str, Any]]:
    """The messages as JSON.

    Raises:
        RequestFailed: a picture that cannot be opened, or a part that is neither text nor picture.
    """
    return [{"role": one["role"], "content": _content(one["content"], media)} for one in messages]


def picture_failed(error: MediaError) -> RequestFailed:
    return RequestFailed(str(error), kind=f"picture: {error.kind}")


def _content(content: Any, media: MediaStore) -> Any:
    return content if isinstance(content, str) else [_part(part, media) for part in content]


def _part(part: Any, media: MediaStore) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise RequestFailed(f"a part of type '{part['type']}': generators read texts and pictures", kind="part")
    try:
        return {"type": "image_url", "image_url": {"url": _data_url(Image(part["image"]), media)}}
    except MediaError as error:
        raise picture_failed(error) from None


def _data_url(image: Image, media: MediaStore) -> str:
    encoded = media.read(image)
    picture = media.open(image, encoded)  # also what goes as it is: engines differ in what damage they let pass
    kind = None if encoded is None else _plain_kind(encoded)
    if kind is None or encoded is None:
        written = io.BytesIO()
        picture.save(written, "PNG", compress_level=1)
        kind, encoded = "image/png", written.getvalue()
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def _plain_kind(encoded: bytes) -> str | None:
    """The media type, where the bytes can be sent as they are."""
    with PIL.Image.open(io.BytesIO(encoded)) as header:
        plain = header.format in ("JPEG", "PNG") and header.mode == "RGB"
        plain = plain and "exif" not in header.info and "transparency" not in header.info
        return PIL.Image.MIME[header.format or ""] if plain else None
