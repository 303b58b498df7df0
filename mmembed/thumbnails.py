"""What pages show of a content: small pictures inlined as JPEGs, texts cut at a word."""

from __future__ import annotations

import base64
import io

import PIL.Image

from mmembed.content import Image
from mmembed.errors import MediaError
from mmembed.media import MediaStore

THUMBNAIL = 132  # pixels of the longer side


def thumbnail(image: Image, media: MediaStore, side: int = THUMBNAIL) -> str:
    """A JPEG of at most `side` pixels a side as a data URL; of a picture that cannot be opened, an empty string."""
    try:
        picture = media.open(image)
    except MediaError:
        return ""
    picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    return as_jpeg(picture)


def as_jpeg(picture: PIL.Image.Image) -> str:
    """A picture as a JPEG in a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=78, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shortened(text: str, length: int) -> str:
    """The text, cut at a word behind at most `length` characters."""
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"
