"""Graded judgements as Trove and SyCL have them: qrels beside a corpus and queries.

corpus.jsonl    {"_id": "d1", "title": "...", "text": "..."}
queries.jsonl   {"_id": "q1", "text": "..."}
qrels.jsonl     {"qid": "q1", "docid": ["d1", "d2"], "score": [3, 0]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, NotRequired

from annotated_types import Ge, MinLen
from typing_extensions import TypedDict

from mmembed.data.corpora import JudgedFolder, Judgement, Pictures
from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds
from mmembed.data.rows import Number, Row, Schema, Words, line_of, plain_text, put, read_rows
from mmembed.errors import RecordError

Grade = Annotated[Number, Ge(0)]


class CorpusFields(TypedDict):
    _id: str
    title: NotRequired[str | None]
    text: str


class QueryFields(TypedDict):
    _id: str
    text: Words


class QrelFields(TypedDict):
    qid: str
    docid: str | Annotated[list[str], MinLen(1)]
    score: Grade | Annotated[list[Grade], MinLen(1)]


class Trove(JudgedFolder):
    """A folder of Trove's: `corpus.jsonl`, `queries.jsonl`, and qrels with graded scores.

    Args:
        qrels: name of the file.
        grouped: write one line a query, with lists; else one a judgement. Both are read.
    """

    name: ClassVar[str] = "trove"
    query_schema: ClassVar[Schema] = Schema(QueryFields)
    corpus_schema: ClassVar[Schema] = Schema(CorpusFields)
    qrel_schema: ClassVar[Schema] = Schema(QrelFields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "title", "meta"}),
        relevance="graded",
        positives=(0, None),
        ordered=True,
        needs=frozenset({"id", "documents.id"}),
        unjudged=frozenset({"queries", "documents"}),
    )

    def __init__(self, qrels: str = "qrels.jsonl", grouped: bool = True) -> None:
        self.qrels, self.grouped = qrels, grouped

    def files(self, path: Path) -> list[Path]:
        return [path / "corpus.jsonl", path / "queries.jsonl", path / self.qrels]

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return all((path / f"{name}.jsonl").is_file() for name in ("corpus", "queries", "qrels"))

    def judgements_file(self, folder: Path) -> Path:
        return folder / self.qrels

    def judgements(self, folder: Path, bad: list[RecordError]) -> dict[str, list[Judgement]]:
        judged: dict[str, list[Judgement]] = {}
        for where, row in read_rows(self.judgements_file(folder), self.qrel_schema):
            try:
                if isinstance(row, RecordError):
                    raise row
                judged.setdefault(row["qid"], []).extend(self._judgements(row, where))
            except RecordError as error:
                bad.append(error)
        return judged

    def _judgements(self, row: Row, where: str) -> list[Judgement]:
        for key in self.qrel_schema.extras(row):
            raise RecordError(where, f"an unknown field '{key}'", "Remove it", "unknown field")
        names, scores = (one if isinstance(one, list) else [one] for one in (row["docid"], row["score"]))
        if len(names) != len(scores):
            found = f"score has {len(scores)} entries, docid has {len(names)}"
            raise RecordError(where, found, "Give one a document", "bad field")
        return [(name, score, where) for name, score in zip(names, scores, strict=True)]

    def write_judgements(self, file: BinaryIO, query: str, documents: list[tuple[str, float]], where: str) -> None:
        if self.grouped and documents:
            names, scores = zip(*documents, strict=True)
            file.write(line_of({"qid": query, "docid": list(names), "score": list(scores)}))
        elif documents:
            file.writelines(line_of({"qid": query, "docid": name, "score": score}) for name, score in documents)

    def document(self, row: Row, folder: Path) -> dict[str, Any]:
        document = {"content": row["text"], "id": row["_id"]}
        return put(document, title=row.get("title"), meta=self.corpus_schema.extras(row))

    def document_row(self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None) -> Row:
        row = {"_id": document["id"], "title": document.get("title") or "", "text": plain_text(document["content"])}
        return self.corpus_schema.with_extras(row, document, where)

    def query(self, row: Row, folder: Path) -> RawRecord:
        return put({"query": row["text"], "id": row["_id"]}, meta=self.query_schema.extras(row))

    def query_row(self, record: RawRecord, pictures: Pictures | None = None) -> Row:
        row = {"_id": record["id"], "text": plain_text(record["query"])}
        return self.query_schema.with_extras(row, record, record["where"])
