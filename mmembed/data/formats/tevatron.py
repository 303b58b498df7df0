"""Tevatron's rows: queries that name their documents by id, and a corpus, both with pictures, frames and sounds.

train.jsonl    {"query_id": "q1", "query_text": "...", "query_image": null, "query_video": null,
                "query_audio": null, "positive_document_ids": ["d1"], "negative_document_ids": ["d2"]}
corpus.jsonl   {"docid": "d1", "text": "...", "image": "a.png", "video": null, "audio": null}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from mmembed.data.corpora import CorpusFile, CorpusFormat, DocumentsOnce, Pictures, QueryIds
from mmembed.data.format_base import RawRecord
from mmembed.data.holding import Holds, normal, respelled, sides, spell
from mmembed.data.rows import Row, Schema, content_of, fields_of, line_of, put, read_rows, writing
from mmembed.errors import RecordError

if TYPE_CHECKING:
    from mmembed.media import MediaStore

KINDS = ("text", "image", "video", "audio")
SIDES = ("positive_document_ids", "negative_document_ids")
Frames = Annotated[list[str], MinLen(1)]


class Fields(TypedDict):
    query_id: str
    query_text: NotRequired[str | None]
    query_image: NotRequired[str | None]
    query_video: NotRequired[Frames | None]
    query_audio: NotRequired[str | None]
    positive_document_ids: Annotated[list[str], MinLen(1)]
    negative_document_ids: NotRequired[list[str] | None]


class CorpusFields(TypedDict):
    docid: str
    text: NotRequired[str | None]
    image: NotRequired[str | None]
    video: NotRequired[Frames | None]
    audio: NotRequired[str | None]


class Tevatron(CorpusFormat):
    """A folder of Tevatron's: queries with `positive_document_ids` and `negative_document_ids`, and a corpus.

    Args:
        queries, corpus: names of the files.
    """

    name: ClassVar[str] = "tevatron"
    schema: ClassVar[Schema] = Schema(Fields)
    corpus_schema: ClassVar[Schema] = Schema(CorpusFields)
    holds: Holds = Holds(
        record=frozenset({"id", "meta"}),
        document=frozenset({"id", "meta"}),
        media=frozenset({"image", "video", "audio"}),
        needs=frozenset({"id", "documents.id"}),
        unjudged=frozenset({"documents"}),
    )

    def __init__(self, queries: str = "train.jsonl", corpus: str = "corpus.jsonl") -> None:
        self.queries, self.corpus = queries, corpus

    def files(self, path: Path) -> list[Path]:
        return [path / self.queries, path / self.corpus]

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return (path / "train.jsonl").is_file() and (path / "corpus.jsonl").is_file() and not (path / "qrels").exists()

    def read_whole(self, path: Path) -> Iterator[RawRecord | RecordError]:
        with closing(CorpusFile(path / self.corpus, self.corpus_schema, "docid")) as corpus:
            yield from corpus.bad
            for where, row in read_rows(path / self.queries, self.schema):
                try:
                    if isinstance(row, RecordError):
                        raise row
                    record = self._record(row, self._documents(row, corpus, path, where), where)
                    yield spell(self.name, record, row, self._row(record))
                except RecordError as error:
                    yield error
            yield from self.alone(corpus, path)

    def write(self, path: Path, records: Iterator[RawRecord], media: MediaStore) -> None:
        with writing(path / self.queries) as queries, writing(path / self.corpus) as corpus:
            once, ids = DocumentsOnce(corpus), QueryIds()
            for record in records:
                documents = []
                for document in record["documents"]:
                    name, row = self.document_as_it_was(document, record["where"])
                    once.add(name, row, record["where"])
                    documents.append({**document, "id": name})
                if "query" in record:
                    whole = {**record, "documents": documents, "id": ids.of(record)}
                    queries.write(line_of(self._row_as_it_was(whole)))

    def document(self, row: Row, folder: Path) -> dict[str, Any]:
        media = {kind: row.get(kind) for kind in KINDS[1:]}
        document = {"content": content_of(row.get("text"), **media), "id": row["docid"]}
        return put(document, meta=self.corpus_schema.extras(row))

    def document_row(self, document: Mapping[str, Any], where: str, pictures: Pictures | None = None) -> Row:
        fields = fields_of(document["content"])
        return self.corpus_schema.with_extras({"docid": document["id"], **fields}, document, where)

    def _documents(self, row: Row, corpus: CorpusFile, folder: Path, where: str) -> list[dict[str, Any]]:
        documents = []
        for side, relevance in zip(SIDES, (None, 0), strict=True):
            for place, name in enumerate(row.get(side) or []):
                document = self.named(corpus, name, f"{side}[{place}]", where, folder)
                documents.append(put(document, relevance=relevance))
        return documents

    def _record(self, row: Row, documents: list[dict[str, Any]], where: str) -> RawRecord:
        text, *media = (row.get(f"query_{kind}") for kind in KINDS)
        query = content_of(text, **dict(zip(KINDS[1:], media, strict=True)))
        if query == "":
            remedy = "Give query_text, query_image, query_video or query_audio"
            raise RecordError(where, "the query is empty", remedy, "empty text")
        record = {"query": query, "documents": documents, "id": row["query_id"], "where": where}
        return put(record, meta=self.schema.extras(row))

    def _row(self, record: RawRecord) -> Row:
        row: Row = {"query_id": record["id"]}
        row.update({f"query_{kind}": value for kind, value in fields_of(record["query"]).items()})
        for side, documents in zip(SIDES, sides(record["documents"]), strict=True):
            row[side] = [document["id"] for document in documents]
        return self.schema.with_extras(row, record, record["where"])

    def _row_as_it_was(self, record: RawRecord) -> Row:
        written = self._row(record)

        def said(row: Row) -> Any:
            """Documents by their ids."""
            self.schema.check(row, record["where"])
            return normal(self._record(row, [], record["where"])), *(row.get(side) or [] for side in SIDES)

        return respelled(self.name, record, written, lambda row: said(row) == said(written))
