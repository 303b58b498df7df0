"""BEIR folders, with pictures: corpus.jsonl, queries.jsonl, qrels/{split}.tsv, and images.parquet beside them.

One record a judged query: its documents are the judged ones, in the order of the qrels, with their grades; a grade of 0
is a labelled negative. The corpus is not loaded: only the places of the judged documents are kept (220 bytes a
document), so the memory follows the judgements and not the corpus; for the same reason an `_id` that stands twice is
found among the judged ones only. For a conversion the whole corpus is read, with titles apart and every other field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NotRequired

from typing_extensions import TypedDict

from mmembed.data.corpora import PICTURES, JudgedFolder, Judgement, Pictures, number_text, picture_of, tsv_line
from mmembed.data.format_base import RawRecord, column, existing, read_json_lines, read_object
from mmembed.data.holding import Holds
from mmembed.data.rows import Row, Schema, fields_of, put
from mmembed.errors import ConfigError, RecordError

Line = tuple[str, str, int]  # document id, grade, number of the line


class CorpusFields(TypedDict):
    _id: str
    title: NotRequired[str | None]
    text: NotRequired[str | None]
    image: NotRequired[str | None]


class QueryFields(TypedDict):
    _id: str
    text: NotRequired[str | None]
    image: NotRequired[str | None]


class Beir(JudgedFolder):
    """A BEIR folder.

    Args:
        split: which file of qrels/.
        lang: keep only queries whose `lang` is one of these.
        kind: keep only queries whose `kind` is one of these.
        negatives_from_zero_scores: keep documents of grade 0, as labelled negatives.

    A document's text is its title and text joined by a space. A document never carries the very picture that its query
    shows: with both, the match would be trivial.
    """

    name: ClassVar[str] = "beir"
    copies_pictures: ClassVar[bool] = True
    query_schema: ClassVar[Schema] = Schema(QueryFields)
    corpus_schema: ClassVar[Schema] = Schema(CorpusFields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "title", "meta"}),
        relevance="graded",
        media=frozenset({"image"}),
        positives=(0, None),
        ordered=True,
        needs=frozenset({"id", "documents.id"}),
        unjudged=frozenset({"queries", "documents"}),
    )

    def __init__(
        self,
        split: str = "train",
        lang: str | Sequence[str] | None = None,
        kind: str | Sequence[str] | None = None,
        negatives_from_zero_scores: bool = True,
    ) -> None:
        self.split = split
        self.filters = {key: _as_set(value) for key, value in (("lang", lang), ("kind", kind)) if value is not None}
        self.negatives_from_zero_scores = negatives_from_zero_scores

    def files(self, path: Path) -> list[Path]:
        names = ("corpus.jsonl", "queries.jsonl", f"qrels/{self.split}.tsv", PICTURES)
        return [path / name for name in names if (path / name).is_file()]

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        bad: list[RecordError] = []
        qrels = self.judgements_file(path)
        judged = _read_qrels(qrels, bad)
        wanted = {document for rows in judged.values() for document, _, _ in rows}
        places = _places(path / "corpus.jsonl", wanted, bad)
        yield from bad
        matched = False
        found: set[str] = set()  # judged queries
        with (path / "corpus.jsonl").open("rb") as corpus:
            for where, row in read_json_lines(path / "queries.jsonl"):
                if isinstance(row, RecordError):
                    yield row
                    continue
                try:
                    query_id = str(column(row, "_id", where))
                    if query_id not in judged:
                        continue
                    if query_id in found:
                        raise _repeated("query", query_id, where)
                    found.add(query_id)
                    if not self._wanted(row, where):
                        continue
                    matched = True
                    yield self._record(row, judged[query_id], places, corpus, path, qrels, where)
                except RecordError as error:
                    yield error
        if not matched:
            chosen = "".join(f", {key} {sorted(values)}" for key, values in self.filters.items())
            raise ConfigError(f"{path}: no query of split '{self.split}'{chosen} has a judged document")
        for query_id, rows in judged.items():
            if query_id not in found:
                missing = f"query '{query_id}' is not in queries.jsonl"
                yield RecordError(f"{qrels}:{rows[0][2]}", missing, "Correct the id", "missing query")

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return (path / "corpus.jsonl").is_file() and (path / "queries.jsonl").is_file() and (path / "qrels").is_dir()

    def judgements_file(self, folder: Path) -> Path:
        return folder / "qrels" / f"{self.split}.tsv"

    def judgements(self, folder: Path, bad: list[RecordError]) -> dict[str, list[Judgement]]:
        file, judged = self.judgements_file(folder), dict[str, list[Judgement]]()
        for query, rows in _read_qrels(file, bad).items():
            for document, grade, number in rows:
                where = f"{file}:{number}"
                try:
                    relevance = _grade(grade, where)
                except RecordError as error:
                    bad.append(error)
                    continue
                if relevance > 0 or self.negatives_from_zero_scores:
                    judged.setdefault(query, []).append((document, relevance, where))
        return judged

    def begin_judgements(self, file: BinaryIO) -> None:
        file.write(b"query-id\tcorpus-id\tscore\n")

    def write_judgements(self, file: BinaryIO, query: str, documents: list[tuple[str, float]], where: str) -> None:
        file.writelines(tsv_line((query, name, number_text(grade)), where) for name, grade in documents)

    def skips(self, row: Row) -> bool:
        return not all(row.get(key) in values for key, values in self.filters.items())

    def document(self, row: Row, folder: Path) -> dict[str, Any]:
        document = {"content": self._shown(row, folder), "id": row["_id"]}
        return put(document, title=row.get("title"), meta=self.corpus_schema.extras(row))

    def document_row(self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None) -> Row:
        content = document["content"]
        text = content if isinstance(content, str) else fields_of(content).get("text", "")
        row = {"_id": document["id"], "title": document.get("title") or "", "text": text}
        return self.corpus_schema.with_extras(put(row, image=picture_of(content, pictures, where)), document, where)

    def query(self, row: Row, folder: Path) -> RawRecord:
        return put({"query": self._shown(row, folder), "id": row["_id"]}, meta=self.query_schema.extras(row))

    @staticmethod
    def _shown(row: Row, folder: Path) -> Any:
        image = row.get("image")
        return row.get("text") or "" if image is None else _content(row.get("text"), image, folder / PICTURES)

    def query_row(self, record: RawRecord, pictures: Pictures | None = None) -> Row:
        content, where = record["query"], record["where"]
        text = content if isinstance(content, str) else fields_of(content).get("text", "")
        row = put({"_id": record["id"], "text": text}, image=picture_of(content, pictures, where))
        return self.query_schema.with_extras(row, record, where)

    def _wanted(self, row: RawRecord, where: str) -> bool:
        return all(column(row, key, where) in values for key, values in self.filters.items())

    def _record(
        self,
        query: RawRecord,
        rows: list[Line],
        places: dict[str, tuple[int, int]],
        corpus: BinaryIO,
        folder: Path,
        qrels: Path,
        where: str,
    ) -> RawRecord:
        documents, table = [], folder / PICTURES
        grades: dict[str, float] = {}
        for document_id, grade, number in rows:
            line = f"{qrels}:{number}"
            relevance = _grade(grade, line)
            if document_id in grades:
                before = grades[document_id]
                if before == relevance:
                    continue
                found = f"document '{document_id}' has the score {relevance:g} here and {before:g} above"
                raise RecordError(line, found, "Keep the one that is right", "two scores")
            grades[document_id] = relevance
            if relevance == 0 and not self.negatives_from_zero_scores:
                continue
            if document_id not in places:
                raise RecordError(
                    line, f"document '{document_id}' is not in corpus.jsonl", "Correct the id", "missing document"
                )
            offset, number = places[document_id]
            corpus.seek(offset)
            what, at = f"document '{document_id}'", f"{folder / 'corpus.jsonl'}:{number}"
            document = read_object(corpus.readline(), at)
            title, body, image = (_string(document, key, what, at) for key in ("title", "text", "image"))
            shown = None if image == query.get("image") else image
            text = " ".join(part for part in (title, body) if part is not None and part.strip())
            if not text and shown is None:
                raise _empty(what, at if image is None else line, image)
            content = _content(text, shown, table)
            documents.append({"content": content, "relevance": relevance, "id": document_id})
        asked, image = (_string(query, key, "the query", where) for key in ("text", "image"))
        content = _content(asked, image, table)
        return {"query": content, "documents": documents, "id": str(query["_id"]), "where": where}


def _read_qrels(path: Path, bad: list[RecordError]) -> dict[str, list[Line]]:
    """Query id -> its judgements. Lines that cannot be read go to `bad`."""
    judged: dict[str, list[Line]] = {}
    with existing(path).open("rb") as file:
        for number, encoded in enumerate(file, start=1):
            line = encoded.decode("utf-8", errors="replace")
            cells = line.rstrip("\r\n").split("\t")
            if (number == 1 and cells[-1] == "score") or not line.strip():
                continue
            if len(cells) != 3:
                remedy = "Write query-id, corpus-id and score, divided by tabs"
                bad.append(RecordError(f"{path}:{number}", f"{len(cells)} columns", remedy, "not a judgement"))
                continue
            judged.setdefault(cells[0], []).append((cells[1], cells[2], number))
    return judged


def _repeated(what: str, name: str, where: str) -> RecordError:
    remedy = "Remove one, or give it an _id of its own"
    return RecordError(where, f"a second {what} with the _id '{name}'", remedy, "repeated id")


def _content(text: str | None, image: str | None, table: Path) -> Any:
    if image is None:
        return text or ""
    reference = f"{table.resolve()}#{image}"
    return {"image": reference, "text": text} if text else {"image": reference}


def _empty(what: str, where: str, image: str | None) -> RecordError:
    """Of a document without content, or of one whose only content its query shows."""
    if image is None:
        return RecordError(
            where, f"{what} has an empty text and no picture", "Correct or remove the line", "empty text"
        )
    return RecordError(where, f"{what} has nothing but the query's own picture", "Remove the judgement", "same picture")


def _string(row: RawRecord, key: str, what: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        found = f"'{key}' of {what} is {value!r:.80}"
        raise RecordError(where, found, "Give a string or remove the key", "not a string")
    return value


def _places(path: Path, wanted: set[str], bad: list[RecordError]) -> dict[str, tuple[int, int]]:
    """Document id -> (byte offset, number) of its line, for the wanted documents. Lines that cannot be read go to
    `bad`."""
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    with existing(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                where = f"{path}:{number}"
                try:
                    document_id = str(column(read_object(line, where), "_id", where))
                    if document_id in places:
                        raise _repeated("document", document_id, where)
                    if document_id in wanted:
                        places[document_id] = offset, number
                except RecordError as error:
                    bad.append(error)
            offset += len(line)
    return places


def _grade(value: str, where: str) -> float:
    try:
        grade = float(value)
    except ValueError:
        grade = -1.0
    if not 0 <= grade < float("inf"):
        raise RecordError(
            where, f"the score is '{value}'", "Give a number, 0 for a negative, above 0 for a positive", "bad number"
        )
    return grade


def _as_set(value: str | Sequence[str]) -> frozenset[str]:
    return frozenset([value] if isinstance(value, str) else value)
