"""TREC runs: what a system retrieved for each query, with its rank and score.

    q1 Q0 d7 1 12.5 bm25

A run says nothing of relevance: `qrels` names a file of judgements, whose grades its documents get, and 0 where nobody
judged; with `queries` and `corpus`, the texts, it can be trained on. Rank and the run's name are kept in `meta`
(`rank`, `tag`); a document without them is written with its place among the scores, and as `mmembed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmembed.data.format_base import RawRecord, WritableFormat, existing
from mmembed.data.holding import Holds
from mmembed.data.rows import put, writing
from mmembed.data.trec import Line, Texts, columns_of, grouped, number_in, spaced_line
from mmembed.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore


class TrecRun(WritableFormat):
    """A TREC run.

    Args:
        queries, corpus: files of JSON lines with `_id`, `text`, and of documents `title`, named from the file's folder.
        qrels: a file of TREC judgements.
    """

    name: ClassVar[str] = "trec_run"
    holds: Holds = Holds(
        record=frozenset({"id"}),
        document=frozenset({"id", "score"}),
        document_meta=frozenset({"rank", "tag", "mark"}),
        relevance="unknown",
        positives=(0, None),
        ordered=True,
        contents=False,
        needs=frozenset({"id", "documents.id", "score"}),
    )

    def __init__(self, queries: str | None = None, corpus: str | None = None, qrels: str | None = None) -> None:
        if (queries is None) != (corpus is None):
            raise ConfigError("formats.trec_run: queries and corpus go together; give both, or none")
        self.queries, self.corpus, self.qrels = queries, corpus, qrels

    def files(self, path: Path) -> list[Path]:
        names = (self.queries, self.corpus, self.qrels)
        return [path, *(path.parent / name for name in names if name is not None)]

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return path.suffix != ".jsonl" and columns_of(path) == 6

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        if self.queries is None or self.qrels is None:
            raise ConfigError(
                f"{existing(path)}: a run has no texts and no judgements; name their files with queries, corpus, qrels"
            )
        yield from self.read_whole(path)

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        bad: list[RecordError] = []
        retrieved = grouped(path, 6, bad)
        judged = {} if self.qrels is None else _grades(path.parent / self.qrels, bad)
        with Texts.beside(path, self.queries, self.corpus) as texts:
            yield from bad + texts.bad
            for name, lines in retrieved.items():
                try:
                    grades = None if self.qrels is None else judged.get(name, {})
                    documents = [texts.document(_document(line, grades), line.where) for line in lines]
                    yield texts.query({"documents": documents, "id": name, "where": lines[0].where})
                except RecordError as error:
                    yield error

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        with writing(path) as file:
            for record in records:
                ranks = _ranks(record["documents"])
                for document, rank in zip(record["documents"], ranks, strict=True):
                    meta = document.get("meta") or {}
                    cells = (record["id"], meta.get("mark", "Q0"), document["id"], str(meta.get("rank", rank)))
                    score, tag = repr(float(document["score"])), meta.get("tag", "mmembed")
                    file.write(spaced_line((*cells, score, tag), record["where"]))


def _document(line: Line, grades: Mapping[str, float] | None) -> dict[str, Any]:
    _, mark, name, rank, score, tag = line.cells
    number = number_in(rank, "the rank", line.where)
    if not number.is_integer():
        raise RecordError(line.where, f"the rank is {rank}", "Write a whole number", "bad number")
    document = {"id": name, "relevance": None if grades is None else grades.get(name, 0.0)}
    document["score"] = number_in(score, "the score", line.where)
    meta = put({"rank": int(number), "tag": tag}, mark=None if mark == "Q0" else mark)
    return {**document, "meta": meta}


def _grades(path: Path, bad: list[RecordError]) -> dict[str, dict[str, float]]:
    judged = grouped(path, 4, bad)
    return {
        name: {line.cells[2]: max(0.0, number_in(line.cells[3], "the grade", line.where)) for line in lines}
        for name, lines in judged.items()
    }


def _ranks(documents: list[dict[str, Any]]) -> list[int]:
    """The place of each by its score, from 1 on; of equal scores the first comes first."""
    order = sorted(range(len(documents)), key=lambda place: -documents[place]["score"])
    ranks = [0] * len(documents)
    for rank, place in enumerate(order, start=1):
        ranks[place] = rank
    return ranks
