"""A reranker over files: records that bring their candidates, and what a first search found.

A record is a line `{"query": ..., "documents": [...]}`. A document is a content (a string, a mapping with `text`,
`image` and so on, perhaps an `id`), or that of a canonical record: `{"content": ..., "id": ..., "relevance": ...}`.
Pairs of several records are scored together, so that short records fill batches; memory is a window of them.

Ranks follow the logits, in float32: probabilities near 1 would tie by rounding. Ties keep the order that was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmembed.content import Content, Image, Video, to_content
from mmembed.data.format_base import read_json_lines
from mmembed.data.records import DOCUMENT_KEYS, RECORD_KEYS, check_unicode, parse_content, parse_string, with_title
from mmembed.errors import MmembedError, RecordError, nearest
from mmembed.inference.reranker import Reranker, Scale
from mmembed.inference.sources import Entry, entry_of_item, entry_of_line
from mmembed.media import MediaStore

OnBad = Literal["raise", "skip"]
Report = Callable[[MmembedError], None]
BOUND = 500.0  # of a logit: beyond the precision of any probability
_SHAPE = '{"query": ..., "documents": [...]}'
WINDOW = 2048  # pairs scored together: enough to fill batches sorted by length


@dataclass(frozen=True, slots=True)
class Question:
    """A query with its candidates.

    Attributes:
        relevances: one a document, None where the record has none.
        shown: the query's content as JSON, where that of `query` has its pictures read.
    """

    query: Entry
    documents: tuple[Entry, ...]
    relevances: tuple[float | None, ...]
    shown: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The candidates of a question, best first: `order` are places in `question.documents`, `scores` belong to them."""

    question: Question
    order: tuple[int, ...]
    scores: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """The line of `mmembed rerank`."""
        question = self.question
        documents = []
        for rank, (index, score) in enumerate(zip(self.order, self.scores, strict=True), start=1):
            document, relevance = question.documents[index], question.relevances[index]
            line: dict[str, Any] = {"rank": rank, "score": score, "index": index}
            line |= {"id": document.id} if document.named else {}
            line |= {} if relevance is None else {"relevance": relevance}
            documents.append(line | {"content": document.content})
        named = {"id": question.query.id} if question.query.named else {}
        told = {} if question.query.instruction is None else {"instruction": question.query.instruction}
        query = question.query.content if question.shown is None else question.shown
        return {**named, "query": query, **told, "documents": documents}


def read_questions(path: Path) -> Iterator[Question | RecordError]:
    """The records of a `.jsonl` file, in order; one that cannot be used comes as a RecordError.

    Raises:
        ConfigError: there is no such file.
    """
    has_table = (path.parent / "images.parquet").is_file()
    for number, (where, row) in enumerate(read_json_lines(path)):
        try:
            yield row if isinstance(row, RecordError) else _question(row, where, number, has_table)
        except RecordError as error:
            yield error


def rerank(
    reranker: Reranker,
    questions: Iterable[Question],
    *,
    top_k: int | None = None,
    instruction: str | None = None,
    scale: Scale = "probability",
    token_budget: int | None = None,
    on_bad: OnBad = "raise",
    report: Report,
) -> Iterator[Answer]:
    """The answers of questions, in their order.

    Args:
        top_k: documents of an answer; None keeps all.
        instruction: of queries that bring none.
        scale: of the scores; see `Reranker.score`.
        on_bad: what is done with a document that cannot be scored; "skip" reports it and leaves it out of its answer,
            and a question of which nothing is left.

    Raises:
        MmembedError: a document cannot be scored and `on_bad` is "raise".
    """
    for window in _windows(questions, apart=reranker.reads_lists):  # which would read them as one list
        pairs = [(one.query, document) for one in window for document in one.documents]
        logits = score_entries(
            reranker, pairs, instruction=instruction, token_budget=token_budget, on_bad=on_bad, report=report
        )
        start = 0
        for question in window:
            own = logits[start : start + len(question.documents)]  # (C,)
            start += len(question.documents)
            order = best_first(own, top_k)
            if not order:
                report(RecordError(question.query.where, "no document is left", "Correct its documents"))
                continue
            best = np.clip(own[list(order)], -BOUND, BOUND)  # JSON has no infinity, the logit of a list of one
            scores = best.tolist() if scale == "logit" else probabilities(best).tolist()
            yield Answer(question, order, tuple(round(score, 6) for score in scores))


def score_entries(
    reranker: Reranker,
    pairs: Sequence[tuple[Entry, Entry]],
    *,
    instruction: str | None = None,
    token_budget: int | None = None,
    on_bad: OnBad = "raise",
    report: Report,
) -> NDArray[np.float32]:
    """(N,) float32 logits of (query, document) pairs; NaN of a pair that was left out.

    Raises:
        MmembedError: a pair cannot be scored and `on_bad` is "raise"; under "skip" it is reported and left out.
    """

    def score(chosen: Sequence[tuple[Entry, Entry]]) -> NDArray[np.float32]:
        told = [instruction if query.instruction is None else query.instruction for query, _ in chosen]
        contents = [(query.content, document.content) for query, document in chosen]
        return reranker.score(contents, instruction=told, scale="logit", token_budget=token_budget, show_progress=False)

    try:
        return score(pairs)
    except MmembedError:
        good = []
        for place, (query, document) in enumerate(pairs):  # find out which, and name it by its place in the source
            try:
                reranker.check(query.content, document.content)
                good.append(place)
            except MmembedError as error:
                said = str(error)  # the media store begins with the picture's name, which is where in a folder of them
                named = MmembedError(said if said.startswith(document.where) else f"{document.where}: {said}")
                if on_bad == "raise":
                    raise named from error
                report(named)
        if len(good) == len(pairs):
            raise
        logits = np.full(len(pairs), np.nan, dtype=np.float32)
        logits[good] = score([pairs[place] for place in good])
        return logits


def best_first(logits: NDArray[np.float32], top_k: int | None) -> tuple[int, ...]:
    """Places of (C,) logits, best first; those that are NaN are left out."""
    order = np.argsort(-logits, kind="stable")  # NaN last
    return tuple(int(place) for place in order[: (~np.isnan(logits)).sum()][:top_k])


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N,) probabilities of being relevant."""
    clipped = np.clip(logits.astype(np.float64), -BOUND, BOUND)
    spread: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-clipped))
    return spread


def rerank_hits(
    reranker: Reranker,
    queries: Sequence[Entry],
    hits: Sequence[Sequence[Mapping[str, Any]]],
    *,
    top_k: int,
    instruction: str | None = None,
    on_bad: OnBad = "raise",
    report: Report,
) -> list[list[dict[str, Any]]]:
    """The hits of a first search in the reranker's order, the first `top_k` of each query.

    Args:
        queries: with their pictures read (`with_bytes`), which may lie anywhere; those of hits the reranker opens.
        hits: of each query, with `rank`, `score` and what `Entry.item` gives.

    Returns:
        The hits with the reranker's `rank` and `score` (a probability), and the first search's as `first_rank` and
        `first_score`.

    Raises:
        MmembedError: as `score_entries`; it names the hit's id.
    """
    questions = [
        Question(query, tuple(entry_of_item(hit) for hit in found), (None,) * len(found))
        for query, found in zip(queries, hits, strict=True)
    ]
    ordered: dict[int, list[dict[str, Any]]] = {}
    places = {id(question): place for place, question in enumerate(questions)}
    for answer in rerank(reranker, questions, top_k=top_k, instruction=instruction, on_bad=on_bad, report=report):
        place = places[id(answer.question)]
        ordered[place] = [
            {
                "rank": rank,
                "score": score,
                "first_rank": hits[place][index]["rank"],
                "first_score": hits[place][index]["score"],
                **{key: value for key, value in hits[place][index].items() if key not in ("rank", "score")},
            }
            for rank, (index, score) in enumerate(zip(answer.order, answer.scores, strict=True), start=1)
        ]
    return [ordered.get(place, []) for place in range(len(questions))]


def with_bytes(entry: Entry, media: MediaStore) -> Entry:
    """The entry with its pictures read, so that another `MediaStore` need not find them.

    Raises:
        MmembedError: a picture is missing or outside the folder.
    """
    parts: list[Any] = []
    for part in to_content(entry.content):
        if isinstance(part, Image):
            parts.append(_read(part, media))
        elif isinstance(part, Video):
            parts.append(Video(tuple(_read(frame, media) for frame in part.frames)))
        else:
            parts.append(part)
    content: Content = tuple(parts)
    return replace(entry, content=content)


def _read(image: Image, media: MediaStore) -> Image:
    encoded = media.read(image)
    return image if encoded is None else Image(encoded)


def _windows(questions: Iterable[Question], apart: bool) -> Iterator[list[Question]]:
    """Questions that are scored together; those with one query in different windows, if `apart`."""
    window: list[Question] = []
    asked: list[Any] = []
    for question in questions:
        query = (question.query.content, question.query.instruction)
        full = sum(len(one.documents) for one in window) >= WINDOW
        if full or (apart and query in asked):
            yield window
            window, asked = [], []
        window.append(question)
        asked.append(query)
    if window:
        yield window


def _question(row: Mapping[str, Any], where: str, number: int, has_table: bool) -> Question:
    if not {"query", "documents"} & row.keys():
        remedy = f"A record is {_SHAPE}; to order all lines of a file for one query, give its text"
        raise RecordError(where, "the record has neither 'query' nor 'documents'", remedy, "missing key")
    for key in row:
        if key not in RECORD_KEYS:
            raise RecordError(where, f"unknown key '{key}'", nearest(key, RECORD_KEYS).capitalize(), "unknown key")
    for key in ("query", "documents"):
        if key not in row:
            raise RecordError(where, f"the record has no '{key}'", f"Add it; a record is {_SHAPE}", "missing key")
    if not isinstance(row["documents"], list) or not row["documents"]:
        raise RecordError(where, "'documents' is not a list with at least one entry", "Add some", "no documents")
    content, told = row["query"], parse_string(row, "instruction", where)
    if isinstance(content, Mapping) and content.get("instruction") is not None:
        told = parse_string(content, "instruction", where)
        content = {key: value for key, value in content.items() if key != "instruction"}
    parse_content(content, "query", where)
    named = row.get("id") is not None
    name = str(row["id"]) if named else str(number)
    check_unicode(name, "the id", where)
    entries = [
        _document(one, f"{where}: documents[{place}]", place, has_table) for place, one in enumerate(row["documents"])
    ]
    query = Entry(name, content, where, told, named)
    return Question(query, tuple(entry for entry, _ in entries), tuple(relevance for _, relevance in entries))


def _document(value: Any, where: str, place: int, has_table: bool) -> tuple[Entry, float | None]:
    """A document and its relevance, where it has one."""
    if isinstance(value, Mapping) and "content" in value:
        for key in value:
            if key not in DOCUMENT_KEYS:
                raise RecordError(
                    where, f"unknown key '{key}'", nearest(key, DOCUMENT_KEYS).capitalize(), "unknown key"
                )
        entry, _ = _document(with_title(value, "the document", where), where, place, has_table)
        relevance = value.get("relevance")
        if relevance is not None and (isinstance(relevance, bool) or not isinstance(relevance, int | float)):
            found = f"'relevance' is a {type(relevance).__name__}"
            raise RecordError(where, found, "Give a number or remove the key", "not a number")
        if value.get("id") is not None:
            entry = replace(entry, id=str(value["id"]), named=True)
        return entry, relevance
    if isinstance(value, Mapping):
        return entry_of_line(dict(value), where, place, has_table), None
    parse_content(value, "the content", where)
    return Entry(str(place), value, where, named=False), None
