"""What is nearest to items among documents: for stages that retrieve. Retrievers are those of mining.

Documents whose contents are equal, or whose ids are, are one. Equal are texts in Unicode's compatible form without case
and white space, and the bytes of their pictures. Vectors are kept (`data_tools.synthesis.encoding`), so a killed run
encodes none twice; search is exact, and is done again.

Cost: documents stay in memory, about 1 kB each besides their texts; each picture is read once for its digest.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.files import digest
from data_tools.synthesis.encoding import encoded
from data_tools.synthesis.stages import Context
from data_tools.synthesis.templates import pictures_of, text_of
from mmembed.config.blocks import TypedBlock
from mmembed.content import Image, Role
from mmembed.data.records import resolve_media
from mmembed.errors import ConfigError, RecordError
from mmembed.inference.sources import media_root, read_entries
from mmembed.media import MediaStore
from mmembed.progress import bar

if TYPE_CHECKING:
    from data_tools.mining.models import Models
    from data_tools.mining.retrievers import Encoder
    from data_tools.mining.retrievers import Item as Content
    from mmembed.search import Hits, Similarity

BLOCK = 1024  # contents that are searched for at a time
Found = list[tuple[int, float]]  # rows of documents and their scores, best first


@dataclass(frozen=True)
class Wanted:
    """What is looked for, and the rows that it must not get."""

    content: Content
    barred: set[int]


class Library:
    """Documents to find: of equal ones, and of those that share an id, the first.

    Attributes:
        documents: N contents.
    """

    def __init__(self, documents: Iterable[Content], media: MediaStore) -> None:
        self.documents: list[Content] = []
        self._media = media
        self._by_key: dict[bytes, int] = {}
        self._by_id: dict[str, set[int]] = {}
        self._by_picture: dict[bytes, set[int]] = {}
        for document in documents:
            key, pictures = self._key(document.content)
            known = min(self._by_id.get(document.id or "", ()), default=len(self.documents))
            row = self._by_key.setdefault(key, known)
            if row == len(self.documents):
                self.documents.append(document)
            for picture in pictures:
                self._by_picture.setdefault(picture, set()).add(row)
            if document.id is not None:
                self._by_id.setdefault(document.id, set()).add(row)

    def like(self, ids: Iterable[str | None], contents: Iterable[Any]) -> set[int]:
        """The rows that have one of these ids or contents."""
        rows = {self._by_key[key] for key, _ in map(self._key, contents) if key in self._by_key}
        return rows.union(*(self._by_id.get(one, ()) for one in ids if one is not None))

    def showing(self, content: Any) -> set[int]:
        """The rows that show a picture of a content."""
        return set().union(*(self._by_picture.get(picture, ()) for picture in self._key(content)[1]))

    def _key(self, content: Any) -> tuple[bytes, list[bytes]]:
        pictures = [self._media.digest(Image(source)) for source in pictures_of(content)]
        plain = "".join(unicodedata.normalize("NFKC", text_of(content)).casefold().split())
        return bytes.fromhex(digest(plain, *pictures)), pictures


def read_corpus(paths: Sequence[Path], media: MediaStore) -> Iterator[Content]:
    """The documents of files and folders. Raises MmembedError at the first that cannot be used."""
    from data_tools.mining.retrievers import Item as Content

    for path in paths:
        for entry in read_entries(path, "documents"):
            if isinstance(entry, RecordError):
                raise entry
            content = resolve_media(entry.content, media_root(path))
            for picture in pictures_of(content):
                media.check(Image(picture))
            yield Content(content, None, entry.id if entry.named else None, entry.where)


def existing(where: str, paths: Sequence[Path]) -> list[Path]:
    """Raises ConfigError for a path that leads nowhere."""
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{where}: there is no {path}; check the path, or set root")
    return list(paths)


class Finder:
    """Finds documents with a retriever of mining.

    Args:
        block: the retriever's.
        roles: in which an encoder reads what is looked for, and documents.
        similarity: of vectors.
    """

    def __init__(
        self,
        block: TypedBlock,
        library: Library,
        context: Context,
        roles: tuple[Role, Role] = ("query", "document"),
        similarity: Similarity = "cosine",
    ) -> None:
        from data_tools.mining.models import Models

        self.documents, self.context, self.roles, self.similarity = library.documents, context, roles, similarity
        self.models: Models = Models(context.folder, block, None)

    def find(self, wanted: Callable[[], Iterator[Wanted]], count: int, depth: int) -> Iterator[Found]:
        """The `depth` best documents of each.

        Args:
            wanted: begins to give all of them, anew at each call.
            count: how many it gives.
        """
        search, given = self._search(wanted), wanted()
        with bar("search", count, " queries") as shown:
            for start in range(0, count, BLOCK):
                block = list(islice(given, BLOCK))
                k = min(len(self.documents), depth + max(len(one.barred) for one in block))
                hits = search(start, block, k)
                for one, rows, scores in zip(block, hits.indices.tolist(), hits.scores.tolist(), strict=True):
                    pairs = zip(rows, scores, strict=True)
                    yield [(row, score) for row, score in pairs if row >= 0 and row not in one.barred][:depth]
                shown.update(len(block))

    def _search(self, wanted: Callable[[], Iterator[Wanted]]) -> Callable[[int, list[Wanted], int], Hits]:
        """(start, block, k) -> the k best of a block of those wanted, which begins at `start`."""
        from data_tools.mining.retrievers import Encoder, Lexical
        from mmembed.search import top_k

        retriever = self.models.retriever
        if isinstance(retriever, Lexical):
            lexical = retriever
            lexical.load(self.context.media)
            lexical.index(self.documents)
            return lambda _, block, k: lexical.search(
                [one.content for one in block], k, np.empty((len(block), 0), np.int64)
            )[0]
        assert isinstance(retriever, Encoder), "a retriever searches or gives vectors"
        corpus = self._encoded("documents", lambda: iter(self.documents), retriever, self.roles[1])
        queries = self._encoded("queries", lambda: (one.content for one in wanted()), retriever, self.roles[0])
        return lambda start, block, k: top_k(queries[start : start + len(block)], corpus, k, similarity=self.similarity)

    def _encoded(self, name: str, contents: Callable[[], Iterator[Content]], encoder: Encoder, role: Role) -> Any:
        """(N, E) vectors, mapped. The model behind a name must stay the same over the lives of a run."""
        return encoded(
            name,
            contents,
            encoder,
            role,
            self.context,
            lambda: self.models.load(encoder, self.context.media),
            lambda: self.models.keep("retriever"),
        )
