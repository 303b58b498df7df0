"""A question, and the rankings that answer it: of each model, and of the reranker behind each.

Every model finds `depth` documents. Each hit that is shown says which rank it has in the ranking that its own is
compared with: a model's in the other model's, the reranker's in that of the model whose hits it ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmembed import search
from mmembed.content import Content, Image, Text
from mmembed.errors import MediaError, MmembedError
from mmembed.explore.sides import Documents, Side
from mmembed.inference.encoding import encode_entries
from mmembed.inference.reranker import Reranker
from mmembed.inference.reranking import rerank_hits
from mmembed.inference.sources import Entry
from mmembed.media import MediaStore


@dataclass(frozen=True)
class Question:
    """What is asked: a text, an image (its encoded bytes), or both.

    Attributes:
        top_k: hits of a ranking that are shown.
        rerank: whether the reranker answers too, where there is one.
    """

    text: str = ""
    image: bytes | None = None
    instruction: str | None = None
    top_k: int = 10
    rerank: bool = True


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        item: its id, text and images, as `Entry.item` gives them.
        other: its rank in the ranking that this one is compared with; None: not among the first `depth` there.
    """

    row: int
    rank: int
    score: float
    item: Mapping[str, Any]
    other: int | None = None


@dataclass(frozen=True)
class Ranking:
    """The best documents, best first.

    Attributes:
        by: the name of the model or reranker.
        side: place of the model that found the documents.
        against: the name of what `Hit.other` is a rank of; None compares with nothing.
    """

    by: str
    side: int
    hits: tuple[Hit, ...]
    against: str | None = None
    reranked: bool = False


@dataclass(frozen=True)
class Answer:
    """Rankings in the order they are shown, and of each model the question's vector (E,)."""

    rankings: tuple[Ranking, ...]
    vectors: tuple[NDArray[np.float32], ...]
    top_k: int
    depth: int

    def last(self, side: int) -> Ranking:
        """What is left of a model's hits in the end: the reranker's ranking of them, where there is one."""
        return [ranking for ranking in self.rankings if ranking.side == side][-1]


class Explorer:
    """Answers questions about documents, one at a time.

    Args:
        reranker: with its name; orders the first `depth` hits of each model.
        media: opens the image of a question.
        depth: hits of each model.
        on_bad, report: what is done with a document that the reranker cannot score.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        media: MediaStore,
        depth: int,
        reranker: tuple[str, Reranker] | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
        report: Callable[[MmembedError], None],
    ) -> None:
        self.documents, self.reranker = documents, reranker
        self.media, self.depth, self.on_bad, self.report = media, depth, on_bad, report
        self._lock = Lock()

    def ask(self, question: Question) -> Answer:
        """The rankings of each model and of the reranker behind it.

        Raises:
            MmembedError: the question is empty, its image cannot be opened, or a model takes no images.
        """
        query = self._query(question)
        depth = min(max(self.depth, question.top_k), len(self.documents))
        with self._lock:
            found = [self._found(side, query, question, depth) for side in self.documents.sides]
            rows = {row for _, hits in found for row in hits}
            items = self.documents.items(rows)
            rankings: list[Ranking] = []
            for place, (_, hits) in enumerate(found):
                rankings.append(self._ranking(place, [one for _, one in found], items, question.top_k))
                if self.reranker is not None and question.rerank:
                    rankings.append(self._reranking(self.reranker, place, hits, items, query, question))
        return Answer(tuple(rankings), tuple(vector for vector, _ in found), question.top_k, depth)

    def _query(self, question: Question) -> Entry:
        text = question.text.strip()
        if not text and question.image is None:
            raise MmembedError("the query is empty; type a text, drop an image, or both")
        if question.top_k < 1:
            raise MmembedError(f"results: found {question.top_k}; give at least 1")
        content: Content = () if question.image is None else (Image(question.image),)
        if question.image is not None:
            try:
                self.media.check(Image(question.image), decode=True)
            except MediaError as error:
                found = error if error.kind == "gigantic" else "damaged, or no image; drop a PNG, JPEG, WebP or GIF"
                raise MmembedError(f"the query's image: {found}") from error
        return Entry("query", (*content, Text(text)) if text else content, "query", named=False)

    def _found(
        self, side: Side, query: Entry, question: Question, depth: int
    ) -> tuple[NDArray[np.float32], dict[int, float]]:
        """The question's vector (E,), and row -> score of what a model finds, best first."""
        _, vectors = encode_entries(
            side.embedder,
            [query],
            "raise",
            self.report,
            role="query",
            instruction=question.instruction,
            truncate_dim=side.truncate_dim,
            show_progress=False,
        )
        hits = search.top_k(vectors, side.vectors, depth, dim=side.size)
        return vectors[0], dict(zip(hits.indices[0].tolist(), hits.scores[0].tolist(), strict=True))

    def _ranking(
        self, place: int, found: Sequence[Mapping[int, float]], items: Mapping[int, Mapping[str, Any]], top_k: int
    ) -> Ranking:
        sides = self.documents.sides
        elsewhere = {
            row: rank for one in (*found[:place], *found[place + 1 :]) for rank, row in enumerate(one, start=1)
        }
        against = next((side.name for side in sides if side is not sides[place]), None)
        hits = [
            Hit(row, rank, score, items[row], elsewhere.get(row))
            for rank, (row, score) in enumerate(list(found[place].items())[:top_k], start=1)
        ]
        return Ranking(sides[place].name, place, tuple(hits), against)

    def _reranking(
        self,
        reranker: tuple[str, Reranker],
        place: int,
        found: Mapping[int, float],
        items: Mapping[int, Mapping[str, Any]],
        query: Entry,
        question: Question,
    ) -> Ranking:
        hits = [
            {"rank": rank, "score": score, "row": row, **items[row]}
            for rank, (row, score) in enumerate(found.items(), start=1)
        ]
        ordered = rerank_hits(
            reranker[1],
            [query],
            [hits],
            top_k=question.top_k,
            instruction=question.instruction,
            on_bad=self.on_bad,
            report=self.report,
        )[0]
        reranked = [Hit(one["row"], one["rank"], one["score"], items[one["row"]], one["first_rank"]) for one in ordered]
        return Ranking(reranker[0], place, tuple(reranked), self.documents.sides[place].name, reranked=True)
