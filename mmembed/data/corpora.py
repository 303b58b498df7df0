"""What formats with a corpus of their own share: documents found by id, written once, and files of judgements.

A record of such a format names its documents by id. Reading keeps the place of each document (about 200 bytes) and not
its text; writing keeps an id and a digest of each (about 150 bytes), so that a document which comes twice is written
once, and two that share an id are told apart. What nobody judged is read as well: queries without documents where they
stand, documents without a query last.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol, cast

from mmembed.content import Image
from mmembed.data.format_base import COMPRESSED, RawRecord, WritableFormat, existing, lines_of, opened, read_object
from mmembed.data.holding import normal, respelled, spell
from mmembed.data.rows import Row, Schema, line_of, made_id, pictures_of, read_rows, writing
from mmembed.errors import MmembedError, RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore

Judgement = tuple[str, float, str]  # document id, relevance, file:line
PICTURES = "images.parquet"
_NOWHERE = Path()  # of rows that are compared


class Corpus(Protocol):
    """Documents by id."""

    def row(self, name: str) -> tuple[Row, str] | None:
        """A row and its file:line; None where there is none of that id."""

    def unused(self) -> Iterator[tuple[Row, str]]:
        """Rows that nobody asked for, in their order."""


class CorpusFile:
    """Documents of a file of JSON lines by id.

    Args:
        key: the field of the id.

    Attributes:
        bad: rows that cannot be used, ids that come twice.
    """

    def __init__(self, path: Path, schema: Schema, key: str) -> None:
        self.path, self._schema = path, schema
        self.bad: list[RecordError] = []
        self._places: dict[str, tuple[int, int]] = {}  # (offset, number) of the line
        self._used: set[str] = set()
        self._file = _seekable(path)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if not line.isspace():
                try:
                    self._keep(line, offset, number, key)
                except RecordError as error:
                    self.bad.append(error)
            offset += len(line)

    def row(self, name: str) -> tuple[Row, str] | None:
        if name not in self._places:
            return None
        self._used.add(name)
        return self._row(*self._places[name])

    def unused(self) -> Iterator[tuple[Row, str]]:
        for name, place in self._places.items():
            if name not in self._used:
                yield self._row(*place)

    def close(self) -> None:
        self._file.close()

    def _keep(self, line: bytes, offset: int, number: int, key: str) -> None:
        where = f"{self.path}:{number}"
        row = read_object(line, where)
        self._schema.check(row, where)
        if row[key] in self._places:
            found, remedy = f"a second document '{row[key]}'", f"Remove one, or give it another {key}"
            raise RecordError(where, found, remedy, "repeated id")
        self._places[row[key]] = offset, number

    def _row(self, offset: int, number: int) -> tuple[Row, str]:
        self._file.seek(offset)
        where = f"{self.path}:{number}"
        return read_object(self._file.readline(), where), where


class DocumentsOnce:
    """Says which documents are new, of those that come again and again.

    Args:
        file: where new ones are written as lines of JSON; None: nowhere.
    """

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = file
        self._seen: dict[str, bytes] = {}

    def add(self, name: str, row: Row, where: str) -> bool:
        """Whether it is new. Raises RecordError where it is another document of an id that was there."""
        line = line_of(row)
        digest = hashlib.blake2b(line, digest_size=8).digest()
        if name in self._seen:
            if self._seen[name] != digest:
                found = f"the document '{name}' is another one here than before"
                raise RecordError(where, found, "Give it an id of its own", "two documents")
            return False
        self._seen[name] = digest
        if self._file is not None:
            self._file.write(line)
        return True


class QueryIds:
    """The id of each record, made where it is missing (`q1`, `q2`, ...), which no other record may have."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def of(self, record: RawRecord) -> str:
        name = record.get("id")
        name = f"q{len(self._seen) + 1}" if name is None else str(name)
        if name in self._seen:
            remedy = "Give it an id of its own, or put its documents into one record"
            raise RecordError(record["where"], f"a second record with the id '{name}'", remedy, "repeated id")
        self._seen.add(name)
        return name


class CorpusFormat(WritableFormat):
    """A format whose documents lie in a corpus."""

    folder: ClassVar[bool] = True
    corpus_schema: ClassVar[Schema]

    def document(self, row: Row, folder: Path) -> dict[str, Any]:
        """The document of a checked row of the corpus of a folder."""
        raise NotImplementedError

    def document_row(self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None) -> Row:
        """The row of a document that has an id."""
        raise NotImplementedError

    def document_as_it_is(self, row: Row, where: str, folder: Path) -> dict[str, Any]:
        """The document, from which `document_as_it_was` makes this very row."""
        document = self.document(row, folder)
        return spell(self.name, document, row, self.document_row(document, where))

    def document_as_it_was(
        self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None
    ) -> tuple[str, Row]:
        """The id, made where it is missing, and the row."""
        own = {key: document[key] for key in ("content", "title", "id", "meta") if document.get(key) is not None}
        own.setdefault("id", made_id(document))
        row = self.document_row(own, where, pictures)

        def says(other: Row) -> Any:
            self.corpus_schema.check(other, where)
            return normal({"documents": [self.document(other, _NOWHERE)]})

        return own["id"], respelled(self.name, own, row, lambda other: says(other) == says(row))

    def named(self, corpus: Corpus, name: str, key: str, where: str, folder: Path) -> dict[str, Any]:
        """The document that `key` names. Raises RecordError where the corpus lacks it."""
        found = corpus.row(name)
        if found is None:
            missing = f"{key} is '{name}', which the corpus lacks"
            raise RecordError(where, missing, "Correct the id, or add the document", "missing document")
        return self.document_as_it_is(*found, folder)

    def alone(self, corpus: Corpus, folder: Path) -> Iterator[RawRecord]:
        """What nobody named."""
        for row, where in corpus.unused():
            yield {"documents": [self.document_as_it_is(row, where, folder)], "where": where}


class JudgedFolder(CorpusFormat):
    """A folder of `corpus.jsonl`, `queries.jsonl` and judgements. Documents keep the order of the judgements."""

    query_schema: ClassVar[Schema]

    def judgements_file(self, folder: Path) -> Path:
        raise NotImplementedError

    def judgements(self, folder: Path, bad: list[RecordError]) -> dict[str, list[Judgement]]:
        """Query id -> its documents. Lines that cannot be read go to `bad`."""
        raise NotImplementedError

    def begin_judgements(self, file: BinaryIO) -> None:
        """The head of their file."""

    def write_judgements(self, file: BinaryIO, query: str, documents: list[tuple[str, float]], where: str) -> None:
        """The lines of one query."""
        raise NotImplementedError

    def query(self, row: Row, folder: Path) -> RawRecord:
        """The record of a query, without documents."""
        raise NotImplementedError

    def query_row(self, record: RawRecord, pictures: Pictures | None = None) -> Row:
        """The row of the query of a record that has an id."""
        raise NotImplementedError

    def skips(self, row: Row) -> bool:
        """Whether an option leaves this query out."""
        return False

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        bad: list[RecordError] = []
        judged = self.judgements(path, bad)
        found: set[str] = set()
        with closing(CorpusFile(path / "corpus.jsonl", self.corpus_schema, "_id")) as corpus:
            yield from bad + corpus.bad
            for where, row in read_rows(path / "queries.jsonl", self.query_schema):
                try:
                    if isinstance(row, RecordError):
                        raise row
                    if row["_id"] in found:
                        remedy = "Remove one, or give it another _id"
                        raise RecordError(where, f"a second query '{row['_id']}'", remedy, "repeated id")
                    found.add(row["_id"])
                    if not self.skips(row):
                        yield self._with_judged(row, judged.get(row["_id"], []), corpus, path, where)
                except RecordError as error:
                    yield error
            for name, rows in judged.items():
                if name not in found:
                    missing = f"query '{name}' is not in queries.jsonl"
                    yield RecordError(rows[0][2], missing, "Correct the id, or add the query", "missing query")
            yield from self.alone(corpus, path)

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        pictures, ids = Pictures(media), QueryIds()
        with ExitStack() as stack:
            names = (path / "corpus.jsonl", path / "queries.jsonl", self.judgements_file(path))
            corpus, queries, judgements = (stack.enter_context(writing(name)) for name in names)
            self.begin_judgements(judgements)
            once = DocumentsOnce(corpus)
            for record in records:
                where, documents = record["where"], []
                for document in record.get("documents") or []:
                    name, row = self.document_as_it_was(document, where, pictures)
                    once.add(name, row, where)
                    documents.append((name, document.get("relevance", 1)))
                if "query" in record:
                    name = ids.of(record)
                    queries.write(line_of(self._query_as_it_was({**record, "id": name}, pictures)))
                    _once_each(documents, where)
                    self.write_judgements(judgements, name, documents, where)
        pictures.write(path / PICTURES)

    def _with_judged(
        self, row: Row, judgements: list[Judgement], corpus: CorpusFile, folder: Path, where: str
    ) -> RawRecord:
        record = {**self.query(row, folder), "documents": [], "where": where}
        record = spell(self.name, record, row, self.query_row(record))
        for name, relevance, line in judgements:
            document = self.named(corpus, name, "the document", line, folder)
            record["documents"].append({**document, "relevance": relevance})
        if judgements:
            _once_each([(name, relevance) for name, relevance, _ in judgements], judgements[-1][2])
        return record

    def _query_as_it_was(self, record: RawRecord, pictures: Pictures) -> Row:
        row = self.query_row(record, pictures)

        def says(other: Row) -> Any:
            self.query_schema.check(other, record["where"])
            return normal(self.query(other, _NOWHERE))

        return respelled(self.name, record, row, lambda other: says(other) == says(row))


class Pictures:
    """The pictures of a folder, as the table `images.parquet` (`image_id`, `image`).

    Where all of them come from one such table, that file is copied as it is, with whatever else it has.
    """

    def __init__(self, media: MediaStore) -> None:
        self._media = media
        self._root = Path() if media.root is None else media.root.absolute()
        self._sources: dict[str, str] = {}  # id -> reference

    def add(self, reference: str, where: str) -> str:
        """The id of a picture: in its table, or its path. Raises RecordError where another one has it."""
        name = image_id(reference)
        if Path(name).is_absolute() and Path(name).is_relative_to(self._root):
            name = str(Path(name).relative_to(self._root))
        if self._sources.setdefault(name, reference) != reference:
            found = f"'{name}' is a picture of {reference} and of {self._sources[name]}"
            raise RecordError(where, found, "Give one of them another name", "repeated id")
        return name

    def write(self, path: Path) -> None:
        """Raises MmembedError for a picture that cannot be read."""
        if not self._sources:
            return
        tables = {reference.rpartition("#")[0] for reference in self._sources.values()}
        named = all(name == image_id(reference) for name, reference in self._sources.items())
        if len(tables) == 1 and named and (table := tables.pop()).endswith(".parquet"):
            self._bytes(next(iter(self._sources.values())))  # may it be opened?
            shutil.copyfile(self._root / table, path)
            return
        self._write_table(path)

    def _write_table(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image_id", pa.string()), ("image", picture)])
        items = list(self._sources.items())
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(items), 64):
                rows = [
                    {"image_id": name, "image": {"bytes": self._bytes(reference), "path": None}}
                    for name, reference in items[start : start + 64]
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    def _bytes(self, reference: str) -> bytes:
        encoded = self._media.read(Image(reference))
        if not encoded:
            raise MmembedError(f"{reference}: an empty file; replace it, or remove what names it")
        return encoded


def image_id(reference: str) -> str:
    """Of a picture in a table of them its id there; else its path."""
    table, mark, name = reference.rpartition("#")
    return name if mark and table.endswith(".parquet") and not name.endswith("]") else reference


def picture_of(content: Any, pictures: Pictures | None, where: str) -> str | None:
    """The id of a content's picture, which goes into `pictures`."""
    for reference in pictures_of(content):
        return image_id(reference) if pictures is None else pictures.add(reference, where)
    return None


def tsv_line(cells: Iterable[str], where: str) -> bytes:
    """Raises RecordError for a cell that would end another one."""
    cells = list(cells)
    for cell in cells:
        if not cell or any(mark in cell for mark in "\t\r\n"):
            raise RecordError(where, f"the id {cell!r} in a table", "Give one without tabs and line ends", "bad id")
    return "\t".join(cells).encode() + b"\n"


def number_text(value: float) -> str:
    """2 rather than 2.0."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _once_each(documents: list[tuple[str, float]], where: str) -> None:
    seen: set[str] = set()
    for name, _ in documents:
        if name in seen:
            raise RecordError(where, f"the document '{name}' is judged twice for one query", "Keep one", "two scores")
        seen.add(name)


def _seekable(path: Path) -> BinaryIO:
    """The file; of a compressed one an unpacked copy, which is gone when it is closed."""
    if existing(path).suffix not in COMPRESSED:
        return path.open("rb")
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        with opened(path) as packed:
            file.writelines(lines_of(packed, path))
        file.seek(0)
        stack.pop_all()
        return cast(BinaryIO, file)
