"""What equal contents share, and what a page shows of a content.

Two contents are equal where mining takes them for equal (`data_tools.mining.collection`): their texts in Unicode's
compatible form, case and white space left out, and the encoded bytes of their pictures, in the same order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmembed.content import Audio, Content, Image, Text, Video
from mmembed.errors import MediaError, RecordError
from mmembed.media import MediaStore
from mmembed.thumbnails import shortened, thumbnail

TEXT = 320  # characters of a text that is shown
PICTURES = 4  # of a content that are shown
_REMEMBERED = 100_000  # digests of pictures


class Keys:
    """Keys of contents. Each picture is read once, as long as it is remembered."""

    def __init__(self, media: MediaStore) -> None:
        self.media = media
        self._pictures: dict[str, bytes] = {}

    def key(self, content: Content, where: str) -> bytes:
        """16 bytes that equal contents share. Raises RecordError where a picture or sound cannot be read."""
        state = blake2b(digest_size=16)
        for part in content:
            encoded = self._part(part, where)
            state.update(len(encoded).to_bytes(8, "little") + encoded)
        return state.digest()

    def _part(self, part: Any, where: str) -> bytes:
        if isinstance(part, Text):
            return b"t" + " ".join(unicodedata.normalize("NFKC", part.text).casefold().split()).encode()
        if isinstance(part, Audio):
            return b"a" + _sound(part, where)
        frames = part.frames if isinstance(part, Video) else (part,)
        mark = b"v" if isinstance(part, Video) else b"i"
        return mark + b"".join(self._picture(frame, where) for frame in frames)

    def _picture(self, image: Image, where: str) -> bytes:
        reference = str(image.source)
        if reference not in self._pictures:
            try:
                found = self.media.digest(image)
            except MediaError as error:
                raise RecordError(where, str(error), "", f"image {error.kind}") from None
            if len(self._pictures) >= _REMEMBERED:
                self._pictures.clear()
            self._pictures[reference] = found
        return self._pictures[reference]


def number(key: bytes) -> int:
    """64 bits of a key."""
    return int.from_bytes(key[:8], "little")


def text_of(content: Content) -> str:
    return " ".join(part.text for part in content if isinstance(part, Text))


def pictures_of(content: Content) -> Iterator[Image]:
    for part in content:
        if isinstance(part, Image):
            yield part
        elif isinstance(part, Video):
            yield from part.frames


def kinds_of(content: Content) -> str:
    """`image + text`: the kinds of its parts."""
    return " + ".join(sorted({type(part).__name__.lower() for part in content}))


def shown(content: Content, media: MediaStore) -> dict[str, Any]:
    """The text, cut, and small pictures as data URLs; of one that cannot be opened an empty string."""
    pictures = list(pictures_of(content))
    return {
        "text": shortened(text_of(content), TEXT),
        "pictures": [thumbnail(one, media) for one in pictures[:PICTURES]],
        "sounds": sum(isinstance(part, Audio) for part in content),
    }


def _sound(part: Audio, where: str) -> bytes:
    try:
        return blake2b(Path(str(part.source)).read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise RecordError(where, f"{part.source}: {error.strerror}", "", "audio unreadable") from None
