"""NeMo AutoModel's training file with corpora beside it: one JSON object, documents in tables.

    train.json                    {"corpus": [{"path": "./corpus"}], "data": [{"question_id": "q1", "question": "...",
                                   "corpus_id": "corpus", "pos_doc": [{"id": "d1"}], "neg_doc": [{"id": "d2"}]}]}
    corpus/merlin_metadata.json   {"class": "TextQADataset", "corpus_id": "corpus"}
    corpus/train.parquet          id, text

Which corpus a question asks is kept in `meta` (`corpus_id`), as is a `query_instruction` of its metadata. The JSON file
is in memory as a whole, and so is each corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.corpora import CorpusFormat, DocumentsOnce, Pictures, QueryIds
from mmembed.data.format_base import RawRecord, existing
from mmembed.data.holding import Holds, respelled, sides, spell, spelling_of, with_spelling
from mmembed.data.rows import Row, Schema, Words, known_ids, plain_text, put, read_object_file
from mmembed.errors import ConfigError, RecordError, nearest

if TYPE_CHECKING:
    from mmembed.media import MediaStore

METADATA = "merlin_metadata.json"
SIDES = ("pos_doc", "neg_doc")


class Named(TypedDict):
    id: str


class Fields(TypedDict):
    question_id: str
    question: Words
    corpus_id: str
    pos_doc: Annotated[list[Named], MinLen(1)]
    neg_doc: NotRequired[list[Named] | None]


class CorpusFields(TypedDict):
    id: str
    text: str


class NeMoCorpus(CorpusFormat):
    """NeMo's `train.json` and its corpora; of a folder the file of that name.

    Args:
        file: its name in a folder.
    """

    name: ClassVar[str] = "nemo_corpus"
    schema: ClassVar[Schema] = Schema(Fields, meta=["corpus_id"])
    corpus_schema: ClassVar[Schema] = Schema(CorpusFields)
    named_schema: ClassVar[Schema] = Schema(Named)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id"}),
        needs=frozenset({"id", "documents.id"}),
        unjudged=frozenset({"documents"}),
    )

    def __init__(self, file: str = "train.json") -> None:
        self.file = file

    def files(self, path: Path) -> list[Path]:
        file = self._file(path)
        return [file, *(one for table in _tables(read_object_file(file), file) for one in table.files)]

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        file = path / "train.json" if path.is_dir() else path
        return file.suffix == ".json" and file.is_file() and b'"corpus"' in file.read_bytes()

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        file = self._file(path)
        content = read_object_file(file)
        for key in content.keys() - {"corpus", "data"}:
            raise ConfigError(f"{file}: an unknown key '{key}'; {nearest(key, ('corpus', 'data'))}")
        if not isinstance(content.get("data"), list):
            raise ConfigError(f"{file}: 'data' is no list; write the list of questions")
        corpora = {table.name: table for table in _tables(content, file)}
        for table in corpora.values():
            yield from table.bad
        told: set[str] = set()
        for place, row in enumerate(content["data"]):
            where = f"{file}:data[{place}]"
            try:
                if not isinstance(row, dict):
                    raise RecordError(where, f"is {row!r:.80}", "Write an object", "bad field")
                record = self._record(row, corpora, file.parent, where)
                yield self._told(record, content["corpus"], corpora[row["corpus_id"]], told)
            except RecordError as error:
                yield error
        for table in corpora.values():
            for record in self.alone(table, file.parent):
                record["documents"][0].setdefault("meta", {})
                yield self._told({**record, "meta": {"corpus_id": table.name}}, content["corpus"], table, told)

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        data, ids, corpora, listed = [], QueryIds(), dict[str, _Written](), None
        for record in records:
            where = record["where"]
            name = str((record.get("meta") or {}).get("corpus_id", "corpus"))
            spelled = spelling_of(self.name, record)
            listed = spelled.get("corpus") if listed is None else listed
            if name not in corpora:
                corpora[name] = _Written(name, spelled.get("path", f"./{name}"), spelled.get("metadata"))
            known = known_ids(record)
            for document, own in zip(record["documents"], known, strict=True):
                _, row = self.document_as_it_was({**document, "id": own}, where)
                corpora[name].add(own, row, where)
            if "query" in record:
                documents = [{**one, "id": own} for one, own in zip(record["documents"], known, strict=True)]
                whole = {**record, "documents": documents, "id": ids.of(record)}
                data.append(self._row_as_it_was(put(whole, meta={**(record.get("meta") or {}), "corpus_id": name})))
        path.mkdir(parents=True)
        for corpus in corpora.values():
            corpus.write(path)
        paths = [{"path": corpus.path} for corpus in corpora.values()]
        content = {"corpus": listed if _paths(listed) == [one["path"] for one in paths] else paths, "data": data}
        (path / self.file).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def document(self, row: Row, folder: Path) -> dict[str, Any]:
        return {"content": row["text"], "id": row["id"]}

    def document_row(self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None) -> Row:
        return {"id": document["id"], "text": plain_text(document["content"])}

    def _file(self, path: Path) -> Path:
        return existing(path / self.file if path.is_dir() else path)

    def _record(self, row: Row, corpora: Mapping[str, _Table], folder: Path, where: str) -> RawRecord:
        self.schema.check(row, where)
        if row["corpus_id"] not in corpora:
            found = f"corpus_id is '{row['corpus_id']}'"
            raise RecordError(where, found, nearest(row["corpus_id"], corpora).capitalize(), "missing corpus")
        documents = []
        for side, relevance in zip(SIDES, (None, 0), strict=True):
            for place, one in enumerate(row.get(side) or []):
                for key in self.named_schema.extras(one):
                    raise RecordError(
                        where, f"{side}[{place}] has an unknown key '{key}'", "Remove it", "unknown field"
                    )
                key = f"{side}[{place}].id"
                document = self.named(corpora[row["corpus_id"]], one["id"], key, where, folder)
                documents.append(put(document, relevance=relevance))
        record = {"query": row["question"], "documents": documents, "id": row["question_id"], "where": where}
        record = put(record, meta=self.schema.extras(row))
        return spell(self.name, record, row, self._row(record))

    def _row(self, record: RawRecord) -> Row:
        row: Row = {"question_id": record["id"], "question": plain_text(record["query"])}
        for side, documents in zip(SIDES, sides(record["documents"]), strict=True):
            row[side] = [{"id": document["id"]} for document in documents]
        return self.schema.with_extras(row, record, record["where"])

    def _row_as_it_was(self, record: RawRecord) -> Row:
        written = self._row(record)

        def said(row: Row) -> Any:
            self.schema.check(row, record["where"])
            return {key: value for key, value in row.items() if value not in (None, [])}

        return respelled(self.name, record, written, lambda row: said(row) == said(written))

    def _told(self, record: RawRecord, listed: Any, table: _Table, told: set[str]) -> RawRecord:
        """The first record of a corpus says where it lies and what its metadata are."""
        if table.name in told:
            return record
        told.add(table.name)
        return with_spelling(self.name, record, corpus=listed, path=table.path, metadata=table.metadata)


class _Table:
    """A corpus by id."""

    def __init__(self, folder: Path, path: str) -> None:
        import pyarrow.parquet as pq

        self.path, self.metadata = path, read_object_file(folder / METADATA)
        for key in ("class", "corpus_id"):
            if not isinstance(self.metadata.get(key), str):
                raise ConfigError(f"{folder / METADATA}: there is no '{key}'; write a string")
        self.name: str = self.metadata["corpus_id"]
        self.files = sorted(folder.glob("*.parquet"))
        if not self.files:
            raise ConfigError(f"{folder}: there is no .parquet file; name the folder of the corpus")
        self.bad: list[RecordError] = []
        self._rows: dict[str, tuple[Row, str]] = {}
        self._used: set[str] = set()
        for file in self.files:
            names = pq.read_schema(file).names
            if sorted(names) != ["id", "text"]:
                raise ConfigError(f"{file}: has the columns {', '.join(names)}; only id and text are read")
            for place, row in enumerate(pq.read_table(file).to_pylist(), start=1):
                self._keep(row, f"{file}:{place}")

    def row(self, name: str) -> tuple[Row, str] | None:
        self._used.add(name)
        return self._rows.get(name)

    def unused(self) -> Iterator[tuple[Row, str]]:
        return (row for name, row in self._rows.items() if name not in self._used)

    def _keep(self, row: Row, where: str) -> None:
        try:
            NeMoCorpus.corpus_schema.check(row, where)
            if row["id"] in self._rows:
                remedy = "Remove one, or give it another id"
                raise RecordError(where, f"a second document '{row['id']}'", remedy, "repeated id")
            self._rows[row["id"]] = row, where
        except RecordError as error:
            self.bad.append(error)


class _Written:
    """A corpus that is being written."""

    def __init__(self, name: str, path: Any, metadata: Any) -> None:
        self.path = path if isinstance(path, str) else f"./{name}"
        known = isinstance(metadata, Mapping) and metadata.get("corpus_id") == name
        self._metadata = metadata if known else {"class": "TextQADataset", "corpus_id": name}
        self._once, self._rows = DocumentsOnce(), list[Row]()

    def add(self, name: str, row: Row, where: str) -> None:
        if self._once.add(name, row, where):
            self._rows.append(row)

    def write(self, root: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = root / self.path
        if not folder.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"the corpus lies at {self.path}, outside of the output; convert it by way of jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        pq.write_table(pa.Table.from_pylist(self._rows, schema=schema), folder / "train.parquet")
        (folder / METADATA).write_text(json.dumps(self._metadata, ensure_ascii=False, indent=1), encoding="utf-8")


def _tables(content: Row, file: Path) -> list[_Table]:
    paths = _paths(content.get("corpus"))
    if not paths:
        raise ConfigError(f"{file}: 'corpus' names no folder; write a list of objects with a 'path'")
    tables = [_Table(file.parent / path, path) for path in paths]
    if len({table.name for table in tables}) < len(tables):
        raise ConfigError(f"{file}: two corpora have one corpus_id; give each its own")
    return tables


def _paths(listed: Any) -> list[str]:
    several = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(several, list) or not all(isinstance(one, Mapping) for one in several):
        return []
    return [one["path"] for one in several if isinstance(one.get("path"), str) and one.keys() == {"path"}]
