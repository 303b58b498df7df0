"""Raw documents, of which pairs are made (`pairs` of the source): lines of JSON, a BEIR corpus, or plain text.

A file that ends in `.txt` holds paragraphs, divided by empty lines; their own line breaks become spaces. Any other is
read as JSON lines with a column of text. Queries and judgements are not looked at: a folder that has them is refused
unless its corpus.jsonl is named, so that nobody trains on pairs out of crops who meant to train on what people judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from mmembed.content import lone_surrogate
from mmembed.data.format_base import COMPRESSED, NOT_UTF8, Format, RawRecord, column, existing, read_json_lines
from mmembed.errors import ConfigError, RecordError

_ENDINGS = (".txt", *(f".jsonl{ending}" for ending in ("", *COMPRESSED)))


class Documents(Format):
    """Raw documents for `pairs`: a `.jsonl` file with a column of text, a `.txt` of paragraphs, or a folder of them.

    Args:
        text: the column of the text; of several columns each is a document of its own.
        title: a column that is put before the text, where a line has it.
    """

    name: ClassVar[str] = "documents"
    streamable: ClassVar[bool] = True
    raw: ClassVar[bool] = True

    def __init__(self, text: str | Sequence[str] = "text", title: str | None = None) -> None:
        self.text, self.title = (text,) if isinstance(text, str) else tuple(text), title
        if not self.text:
            raise ConfigError("formats.documents: text is an empty list; name a column")

    def files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        return sorted(file for file in path.rglob("*") if file.name.endswith(_ENDINGS))

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        if (path / "queries.jsonl").exists() or (path / "qrels").is_dir():
            raise ConfigError(
                f"{path}: holds queries and judgements; train on them with format: beir, or name "
                f"{path / 'corpus.jsonl'} to make pairs of its documents alone"
            )
        files = self.files(path)
        if not files:
            raise ConfigError(
                f"{path}: the folder holds no .jsonl and no .txt file; give the folder with the documents"
            )
        for file in files:
            yield from self._paragraphs(existing(file)) if file.suffix == ".txt" else self._rows(file)

    def _rows(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_json_lines(path):
            if isinstance(row, RecordError):
                yield row
                continue
            if "query" in row and "documents" in row:
                raise ConfigError(
                    f"{where}: a record with a query and documents, of which no pairs need be made; remove pairs and "
                    "use format: jsonl"
                )
            for name in self.text:
                try:
                    yield {"query": self._document(row, name, where), "where": where}
                except RecordError as error:
                    yield error

    def _document(self, row: RawRecord, name: str, where: str) -> str:
        titled = self.title is not None and row.get(self.title) is not None
        names = [self.title, name] if titled else [name]
        texts = [column(row, str(key), where) for key in names]
        for key, text in zip(names, texts, strict=True):
            if not isinstance(text, str):
                found = f"'{key}' is {text!r:.80}"
                raise RecordError(where, found, "Give a string or remove the line", "not a string")
        return " ".join(text for text in texts if text.strip())

    @staticmethod
    def _paragraphs(path: Path) -> Iterator[RawRecord | RecordError]:
        lines: list[str] = []
        first = 0
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(itertools.chain(file, [""]), start=1):
                if line.strip():
                    first = first if lines else number
                    lines.append(line.strip())
                elif lines:
                    where, text = f"{path}:{first}", " ".join(lines)
                    lines = []
                    if lone_surrogate(text) is None:
                        yield {"query": text, "where": where}
                    else:
                        remedy = "Convert the file, or correct the paragraph"
                        yield RecordError(where, f"a paragraph that is {NOT_UTF8}", remedy, NOT_UTF8)
