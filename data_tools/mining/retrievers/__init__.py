"""What scores queries with a corpus: a file each. `type` of the config's `retriever` is the name.

An `Encoder` gives vectors, which are stored, searched and compared by the command; a `Lexical` retriever searches by
itself. The constructor's arguments are the options of the block; nothing is loaded before `load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmembed.content import Role, Text, to_content
from mmembed.errors import MmembedError
from mmembed.media import MediaStore
from mmembed.registry import Registry
from mmembed.search import Hits

PROBE = "A red bus, 42 trains, 紅色."


@dataclass(frozen=True)
class Item:
    """A query or a document.

    Attributes:
        content: JSON content with absolute paths of media.
        id: its record's or its own, None where it has none.
        where: `file:line`.
    """

    content: Any
    instruction: str | None
    id: str | None
    where: str

    @property
    def text(self) -> str:
        """Its texts, joined by spaces."""
        if isinstance(self.content, str):
            return self.content
        return " ".join(part.text for part in to_content(self.content) if isinstance(part, Text))

    def __str__(self) -> str:
        return f"{self.where}{'' if self.id is None else f' ({self.id})'}"


class Retriever:
    """Base of all.

    reads: the kinds of parts that it takes.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset({"text"})

    def fingerprint(self) -> Any:
        """What its scores depend on, as JSON: weights and settings. Read before anything is loaded.

        Raises MmembedError where there is no such model.
        """
        raise NotImplementedError

    def load(self, media: MediaStore) -> None:
        """Gets ready. `media` opens the pictures of the source that comes next; called for each source."""


class Encoder(Retriever):
    """Base of those that give vectors."""

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        """(n, E) vectors, which depend on nothing but the items of this call. Raises MmembedError naming an item."""
        raise NotImplementedError

    def probe(self) -> NDArray[np.float32] | None:
        """(E,) of a fixed text, by which a model that has changed is recognised; None where none can be computed."""
        return self.encode([Item(PROBE, None, None, "the probe")], "document")[0]


class Lexical(Retriever):
    """Base of those that search without vectors."""

    def index(self, documents: Sequence[Item]) -> None:
        raise NotImplementedError

    def search(self, queries: Sequence[Item], k: int, rows: NDArray[np.int64]) -> tuple[Hits, NDArray[np.float32]]:
        """The best k of each query, (Q, k), and the scores of its own `rows` (Q, P), NaN where a row is -1."""
        raise NotImplementedError


RETRIEVERS: Registry[Retriever] = Registry("data_tools.mining.retrievers", Retriever)


def text_alone(item: Item, name: str) -> str:
    """The text of an item without media. Raises MmembedError for others."""
    if not all(isinstance(part, Text) for part in to_content(item.content)):
        raise MmembedError(f"{item}: '{name}' reads texts alone; choose another retriever, or leave it out")
    return item.text
