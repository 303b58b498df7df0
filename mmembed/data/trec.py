"""What TREC's two files share: lines of cells that white space divides, grouped by query, and texts from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

from mmembed.data.corpora import CorpusFile
from mmembed.data.format_base import NOT_UTF8, RawRecord, lines_of, opened
from mmembed.data.rows import Schema, put
from mmembed.errors import RecordError


class Line(NamedTuple):
    cells: list[str]
    where: str


class TextFields(TypedDict):
    _id: str
    title: NotRequired[str | None]
    text: str


class Texts:
    """Gives records of ids their texts; without files it leaves them as they are."""

    def __init__(self, queries: CorpusFile | None, corpus: CorpusFile | None) -> None:
        self._queries, self._corpus = queries, corpus
        self.bad = [error for file in (queries, corpus) if file is not None for error in file.bad]

    @classmethod
    @contextmanager
    def beside(cls, path: Path, queries: str | None, corpus: str | None) -> Iterator[Texts]:
        """Of two files of JSON lines, relative to the folder of `path`."""
        schema = Schema(TextFields)
        with ExitStack() as stack:
            files = [
                None if name is None else stack.enter_context(closing(CorpusFile(path.parent / name, schema, "_id")))
                for name in (queries, corpus)
            ]
            yield cls(*files)

    def query(self, record: RawRecord) -> RawRecord:
        if self._queries is None:
            return record
        return {"query": self._row(self._queries, record["id"], "the query", record["where"])["text"], **record}

    def document(self, document: dict[str, Any], where: str) -> dict[str, Any]:
        if self._corpus is None:
            return document
        row = self._row(self._corpus, document["id"], "the document", where)
        return put({"content": row["text"], **document}, title=row.get("title"))

    @staticmethod
    def _row(file: CorpusFile, name: str, what: str, where: str) -> dict[str, Any]:
        found = file.row(name)
        if found is None:
            missing = f"{what} '{name}' is not in {file.path.name}"
            raise RecordError(where, missing, "Correct the id, or add the line", "missing text")
        return found[0]


def grouped(path: Path, columns: int, bad: list[RecordError]) -> dict[str, list[Line]]:
    """Query id -> its lines, in the order of the file. Lines that cannot be used go to `bad`."""
    found: dict[str, list[Line]] = {}
    seen: set[tuple[str, str]] = set()
    with opened(path) as file:
        for number, encoded in enumerate(lines_of(file, path), start=1):
            where = f"{path}:{number}"
            try:
                cells = encoded.decode("utf-8").split()
            except UnicodeDecodeError:
                bad.append(RecordError(where, NOT_UTF8, "Convert the file, or correct the line", NOT_UTF8))
                continue
            if not cells:
                continue
            if len(cells) != columns:
                remedy = f"Write {columns}, divided by spaces"
                bad.append(RecordError(where, f"{len(cells)} columns", remedy, "not a line of TREC"))
            elif (cells[0], cells[2]) in seen:
                remedy = "Keep one of the lines"
                bad.append(RecordError(where, f"'{cells[2]}' once more for query '{cells[0]}'", remedy, "repeated id"))
            else:
                seen.add((cells[0], cells[2]))
                found.setdefault(cells[0], []).append(Line(cells, where))
    return found


def number_in(cell: str, what: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RecordError(where, f"{what} is '{cell}'", "Write a number", "bad number")
    return number


def columns_of(path: Path) -> int:
    """Of the first line of a file; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return len(file.readline(10_000).split())


def spaced_line(cells: Iterable[Any], where: str) -> bytes:
    """Raises RecordError for a cell that would be two."""
    cells = [str(cell) for cell in cells]
    for cell in cells:
        if cell.split() != [cell]:
            raise RecordError(where, f"{cell!r} in a line of TREC", "Give an id without white space", "bad id")
    return " ".join(cells).encode() + b"\n"
