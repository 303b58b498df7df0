"""What models put first for single queries, as pages show it: small pictures, the beginnings of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import PIL.Image

from mmembed.thumbnails import THUMBNAIL, as_jpeg

SHOWN, CUT = 5, 160  # documents of a query, letters of a text


class Examples:
    """Queries of a ranking with what was found for them.

    Args:
        data: of an mteb task: `corpus`, `queries`, `relevant_docs`.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self._documents = {key: place for place, key in enumerate(data["corpus"]["id"])}
        self._queries = {key: place for place, key in enumerate(data["queries"]["id"])}

    def drawn(self) -> list[str]:
        """Ids of all queries in the order of a hash, so whoever takes the first takes no favourites."""
        return by_hash(self._queries)

    def of(self, query: str, sides: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """A query for the page: `text`, `image`, and of each side its first documents, the relevant ones marked.

        Args:
            sides: name -> ids of documents, the best first.
        """
        judged = self.data["relevant_docs"][query]
        found = [
            {"name": name, "documents": [
                {**recognisable(self.data["corpus"][self._documents[key]]), "right": judged.get(key, 0) > 0}
                for key in documents[:SHOWN]
            ]}
            for name, documents in sides.items()
        ]  # fmt: skip
        return {**recognisable(self.data["queries"][self._queries[query]]), "sides": found}


def by_hash(ids: Iterable[str]) -> list[str]:
    return sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())


def recognisable(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a person needs to recognise a query or a document: the beginning of its text, a small picture."""
    image, text = row.get("image"), " ".join((row.get("text") or "").split())
    text = " ".join(filter(None, (row.get("title"), text)))
    return {"text": text[:CUT] + ("…" if len(text) > CUT else ""), "image": None if image is None else inlined(image)}


def inlined(image: PIL.Image.Image) -> str:
    """A picture as a small JPEG in a data URL, transparent parts on white."""
    picture = image.convert("RGBA")
    picture.thumbnail((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    flat = PIL.Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    return as_jpeg(flat)
