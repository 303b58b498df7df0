"""Parquet tables whose columns are texts or encoded pictures; pictures are taken by reference, never copied into RAM.

Each row is one record: a query, a positive document, and any number of negative columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmembed.data.format_base import Format, RawRecord, existing
from mmembed.errors import ConfigError, RecordError, nearest


class Parquet(Format):
    """A parquet file, or a folder of them.

    Args:
        query_column, document_column: columns with the texts of the query and of its positive document; None: no text.
        query_image_column, document_image_column: columns with encoded pictures (binary, or a struct with `bytes`).
        negative_columns: text columns, each a document of relevance 0; an empty cell is passed over.
        negative_image_columns: picture columns, each a document of relevance 0.
        score_column: a teacher's score of the positive document.
        relevance_column: its relevance, where it is not 1.
        id_column: the record's id.
    """

    name: ClassVar[str] = "parquet"
    streamable: ClassVar[bool] = True

    def __init__(
        self,
        query_column: str | None = "query",
        document_column: str | None = "document",
        query_image_column: str | None = None,
        document_image_column: str | None = None,
        negative_columns: Sequence[str] = (),
        negative_image_columns: Sequence[str] = (),
        score_column: str | None = None,
        relevance_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        self.query = (query_column, query_image_column)
        self.document = (document_column, document_image_column)
        self.negatives: list[tuple[str | None, str | None]] = [(name, None) for name in negative_columns]
        self.negatives += [(None, name) for name in negative_image_columns]
        self.extras = {"score": score_column, "relevance": relevance_column}
        self.id_column = id_column
        for what, columns in (("query", self.query), ("document", self.document)):
            if columns == (None, None):
                raise ConfigError(f"formats.parquet: neither {what}_column nor {what}_image_column is given; name one")

    def files(self, path: Path) -> list[Path]:
        return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        files = self.files(path)
        if not files:
            raise ConfigError(f"{path}: the folder holds no .parquet file; give the folder with the tables")
        for file in files:
            yield from self._read_table(existing(file))

    def _read_table(self, path: Path) -> Iterator[RawRecord]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path}: not a readable parquet file ({error})") from None
        texts, pictures = self._columns(table.schema_arrow.names, path)
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[*texts, *pictures]):
            there = {name: pc.is_valid(batch.column(name)).to_pylist() for name in pictures}  # the bytes stay in Arrow
            for offset, values in enumerate(batch.select(texts).to_pylist() or [{}] * batch.num_rows):
                cells = {name: f"{path.resolve()}#{name}[{row}]" for name in pictures if there[name][offset]}
                yield self._record({**values, **cells}, f"{path}:{row + 1}")
                row += 1

    def _columns(self, known: list[str], path: Path) -> tuple[list[str], list[str]]:
        """The text (and number) columns and the picture columns that are used."""
        pairs = (self.query, self.document, *self.negatives)
        texts = [text for text, _ in pairs] + [*self.extras.values(), self.id_column]
        used = [sorted({name for name in names if name}) for names in (texts, [picture for _, picture in pairs])]
        for name in used[0] + used[1]:
            if name not in known:
                raise ConfigError(f"{path}: there is no column '{name}'; {nearest(name, known)}")
        return used[0], used[1]

    def _record(self, cells: dict[str, Any], where: str) -> RawRecord:
        positive: dict[str, Any] = {"content": _content(self.document, cells)}
        for key, name in self.extras.items():
            if name is not None and cells[name] is not None:
                positive[key] = cells[name]
        documents = [positive]
        for columns in self.negatives:
            content = _content(columns, cells)
            if content != "":
                documents.append({"content": content, "relevance": 0.0})
        record = {"query": _content(self.query, cells), "documents": documents, "where": where}
        return record if self.id_column is None else {**record, "id": str(cells[self.id_column])}


def _content(columns: tuple[str | None, str | None], cells: dict[str, Any]) -> Any:
    text, picture = (cells.get(name) if name else None for name in columns)
    if picture is None:
        return "" if text is None else text
    return {"image": picture, "text": text} if text else {"image": picture}
