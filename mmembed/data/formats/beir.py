"""BEIR folders, with pictures: corpus.jsonl, queries.jsonl, qrels/{split}.tsv, and images.parquet beside them.

One record a judged query: its documents are the judged ones, in the order of the qrels, with their grades; a grade of 0
is a labelled negative. The corpus is not loaded: only the places of the judged documents are kept (220 bytes a
document), so the memory follows the judgements and not the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from mmembed.data.format_base import Format, RawRecord, column, existing, read_json_lines
from mmembed.errors import ConfigError, RecordError


class Beir(Format):
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
        names = ("corpus.jsonl", "queries.jsonl", f"qrels/{self.split}.tsv", "images.parquet")
        return [path / name for name in names if (path / name).is_file()]

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        bad: list[RecordError] = []
        judged = self._read_qrels(path / "qrels" / f"{self.split}.tsv", bad)
        wanted = {document for rows in judged.values() for document, _, _ in rows}
        places = _places(path / "corpus.jsonl", wanted, bad)
        yield from bad
        matched = False
        with (path / "corpus.jsonl").open("rb") as corpus:
            for where, row in read_json_lines(path / "queries.jsonl"):
                if isinstance(row, RecordError):
                    yield row
                    continue
                try:
                    rows = judged.get(str(column(row, "_id", where)), [])
                    if not rows or not self._wanted(row, where):
                        continue
                    matched = True
                    yield self._record(row, rows, places, corpus, path, where)
                except RecordError as error:
                    yield error
        if not matched:
            chosen = "".join(f", {key} {sorted(values)}" for key, values in self.filters.items())
            raise ConfigError(f"{path}: no query of split '{self.split}'{chosen} has a judged document")

    def _read_qrels(self, path: Path, bad: list[RecordError]) -> dict[str, list[tuple[str, str, str]]]:
        """Query id -> [(document id, grade, file:line), ...]. Lines that cannot be read go to `bad`."""
        judged: dict[str, list[tuple[str, str, str]]] = {}
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
                judged.setdefault(cells[0], []).append((cells[1], cells[2], f"{path}:{number}"))
        return judged

    def _wanted(self, row: RawRecord, where: str) -> bool:
        return all(column(row, key, where) in values for key, values in self.filters.items())

    def _record(
        self,
        query: RawRecord,
        rows: list[tuple[str, str, str]],
        places: dict[str, tuple[int, int]],
        corpus: BinaryIO,
        folder: Path,
        where: str,
    ) -> RawRecord:
        documents, table = [], folder / "images.parquet"
        for document_id, grade, line in rows:
            relevance = _grade(grade, line)
            if relevance == 0 and not self.negatives_from_zero_scores:
                continue
            if document_id not in places:
                raise RecordError(
                    line, f"document '{document_id}' is not in corpus.jsonl", "Correct the id", "missing document"
                )
            offset, number = places[document_id]
            corpus.seek(offset)
            document = json.loads(corpus.readline())
            what, at = f"document '{document_id}'", f"{folder / 'corpus.jsonl'}:{number}"
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
            try:
                document_id = str(json.loads(line)["_id"])
            except (ValueError, KeyError, TypeError) as error:
                found = f"not an object with an '_id' ({error!r})"
                if not line.isspace():
                    bad.append(RecordError(f"{path}:{number}", found, "Correct or remove the line", "not a document"))
            else:
                if document_id in wanted:
                    places[document_id] = offset, number
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
