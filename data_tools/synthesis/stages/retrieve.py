"""Candidates for queries: the nearest documents of a corpus, which a stage behind this one judges.

BM25 or any other retriever of mining finds them; nothing is trained. What an item has as a document, what equals one of
those or the query, and what shows a picture of the query is no candidate. Vectors are kept in shards, search is exact
(`data_tools.synthesis.finding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.files import stamps
from data_tools.synthesis.finding import Finder, Library, Wanted, existing, read_corpus
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.errors import ConfigError
from mmembed.registry import Positive


class Retrieve(SetStage):
    """Candidates from a corpus.

    Args:
        corpus: files and folders, relative to `root`: a corpus.jsonl of BEIR, lines of content, records (of which the
            documents are taken), pictures.
        retriever: a block, as in a config of mining.
        depth: candidates of an item.
        similarity: of vectors.
    """

    name: ClassVar[str] = "retrieve"
    takes: ClassVar[frozenset[Kind]] = frozenset({"queries", "records"})
    adds: ClassVar[frozenset[str]] = frozenset({"candidates"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        corpus: str | Sequence[str],
        retriever: TypedBlock = "bm25",
        depth: Positive = 20,
        similarity: Literal["cosine", "dot"] = "cosine",
    ) -> None:
        from data_tools.mining.retrievers import RETRIEVERS

        paths = [corpus] if isinstance(corpus, str) else list(corpus)
        if not paths:
            raise ConfigError("retrieve.corpus: is empty; give files or folders of documents")
        self.corpus = existing("retrieve.corpus", [below_root(path) for path in paths])
        self.retriever, self.depth, self.similarity = retriever, depth, similarity
        self._built = RETRIEVERS.build(retriever)
        if similarity != "cosine" and self._built.name == "bm25":
            raise ConfigError(
                "retrieve.similarity has no effect with retriever 'bm25', which has no vectors; remove it"
            )

    def fingerprint(self) -> Any:
        return [self._built.fingerprint(), stamps(self.corpus)]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        from data_tools.mining.retrievers import Item as Content

        if not len(items):
            return
        library = Library(read_corpus(self.corpus, context.media), context.media)
        context.notes["documents of the corpus"] = len(library.documents)
        finder = Finder(self.retriever, library, context, similarity=self.similarity)

        def wanted() -> Iterator[Wanted]:
            for item in items:
                own = item.get("documents", [])
                contents = [item["query"], *(document["content"] for document in own)]
                barred = library.like([document.get("id") for document in own], contents)
                content = Content(item["query"], item.get("instruction"), item["id"], f"item '{item['id']}'")
                yield Wanted(content, barred | library.showing(item["query"]))

        found = finder.find(wanted, len(items), self.depth)
        for item, rows in zip(items, found, strict=True):
            context.notes["candidates"] += len(rows)
            context.notes["items without candidates"] += not rows
            yield {**item, "candidates": [_candidate(library.documents[row], score) for row, score in rows]}

    def sampled(self, item: Item, context: Context) -> Item:
        first = islice(read_corpus(self.corpus, context.media), self.depth)
        return {**item, "candidates": [_candidate(document, 0.0) for document in first]}


def _candidate(document: Any, score: float) -> dict[str, Any]:
    named = {} if document.id is None else {"id": document.id}
    return {"content": document.content, "score": score, **named}
