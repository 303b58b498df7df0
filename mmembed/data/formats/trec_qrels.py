"""TREC judgements: lines of a query's id, a number that nobody reads, a document's id and a grade.

    q1 0 d7 2

They name texts and have none: `queries` and `corpus` say where those lie. Without them a conversion gives records of
ids alone, which TREC files and nothing else can hold. A grade below 0 (spam) counts as 0 and is kept in `meta`
(`grade`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmembed.data.corpora import number_text
from mmembed.data.format_base import RawRecord, WritableFormat, existing
from mmembed.data.holding import Holds
from mmembed.data.rows import put, writing
from mmembed.data.trec import Line, Texts, columns_of, grouped, number_in, spaced_line
from mmembed.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore


class TrecQrels(WritableFormat):
    """A file of TREC judgements.

    Args:
        queries, corpus: files of JSON lines with `_id`, `text`, and of documents `title`, named from the file's folder.
    """

    name: ClassVar[str] = "trec_qrels"
    holds: Holds = Holds(
        record=frozenset({"id"}),
        document=frozenset({"id"}),
        document_meta=frozenset({"iteration", "grade"}),
        relevance="graded",
        positives=(0, None),
        ordered=True,
        contents=False,
        needs=frozenset({"id", "documents.id"}),
    )

    def __init__(self, queries: str | None = None, corpus: str | None = None) -> None:
        if (queries is None) != (corpus is None):
            raise ConfigError("formats.trec_qrels: queries and corpus go together; give both, or none")
        self.queries, self.corpus = queries, corpus

    def files(self, path: Path) -> list[Path]:
        return [path, *(path.parent / name for name in (self.queries, self.corpus) if name is not None)]

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return path.suffix != ".jsonl" and columns_of(path) == 4

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        if self.queries is None:
            raise ConfigError(f"{existing(path)}: judgements have no texts; name their files with queries and corpus")
        yield from self.read_whole(path)

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        bad: list[RecordError] = []
        judged = grouped(path, 4, bad)
        with Texts.beside(path, self.queries, self.corpus) as texts:
            yield from bad + texts.bad
            for name, lines in judged.items():
                try:
                    documents = [texts.document(_document(line), line.where) for line in lines]
                    yield texts.query({"documents": documents, "id": name, "where": lines[0].where})
                except RecordError as error:
                    yield error

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        with writing(path) as file:
            for record in records:
                for document in record["documents"]:
                    meta = document.get("meta") or {}
                    grade = meta.get("grade", document.get("relevance", 1))
                    cells = (record["id"], meta.get("iteration", "0"), document["id"], number_text(grade))
                    file.write(spaced_line(cells, record["where"]))


def _document(line: Line) -> dict[str, Any]:
    _, iteration, name, cell = line.cells
    grade = number_in(cell, "the grade", line.where)
    meta = put({}, iteration=None if iteration == "0" else iteration, grade=grade if grade < 0 else None)
    return put({"id": name, "relevance": max(grade, 0.0)}, meta=meta)
