"""What `mmembed encode` and `mmembed search` read: images, JSON lines, parquet tables, and folders of one of these.

A line is a content (`{"text": ..., "image": ...}`, with an optional `id` or `_id`, `title` and `instruction`) or a
canonical record of training data, of which one side is taken: the queries, or the documents (each id once). In a BEIR
folder `image` may be the id of a row of the `images.parquet` beside the file. A row of a parquet table is the same as a
line, but that columns of other names are not read. Entries come one at a time, in order; memory does not depend on the
size of the source, but for the ids of documents of records already seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmembed.content import CONTENT_KEYS
from mmembed.data.format_base import COMPRESSED, read_json_lines
from mmembed.data.records import check_unicode, content_to_json, parse_content, parse_record, parse_string
from mmembed.errors import MmembedError, RecordError, nearest

Field = Literal["query", "documents"]
LINE_SUFFIXES = (".jsonl", *(f".jsonl{suffix}" for suffix in COMPRESSED))
TABLE_SUFFIX = ".parquet"
TABLE_OF_IMAGES = "images.parquet"  # of a BEIR folder: its rows are pictures, not entries
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LINE_KEYS = (*CONTENT_KEYS, "id", "_id", "title")
_RECORD_KEYS = ("query", "documents", "task", "source")
_ROWS = 1024  # of a table, in memory at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to encode. `content` is JSON content: paths of media, not pixels. Without `named`, its id is its place
    in the source."""

    id: str
    content: Any
    where: str
    instruction: str | None = None
    named: bool = True

    def summary(self) -> dict[str, Any]:
        """What a person needs to recognise it: `text` and `image` where it has them."""
        if isinstance(self.content, str):
            return {"text": self.content}
        if isinstance(self.content, Mapping):
            return {key: self.content[key] for key in ("text", "image", "images") if key in self.content}
        return {"text": json.dumps(self.content, ensure_ascii=False)}

    def item(self) -> dict[str, Any]:
        """The line of an encoded folder: id and summary, and the content where the summary leaves something out."""
        shown = self.summary()
        whole = isinstance(self.content, str) or self.content == shown
        return {"id": self.id, **shown, **({} if whole else {"content": self.content})}


def read_entries(source: str | Path, field: Field = "documents") -> Iterator[Entry | RecordError]:
    """The entries of a source; a line that cannot be used comes as a RecordError.

    Args:
        source: a folder of images (searched with its subfolders, sorted by path), a file of JSON lines, also
            compressed, or of parquet, or a folder of such files.
        field: which side of a canonical record.

    Raises:
        MmembedError: there is no such source, a folder with neither, a table without a column of contents.
    """
    path = Path(source)
    if path.is_dir() and not _data_files(path):
        return _read_images(path)
    return _read_rows(source_files(path), field)


def source_files(source: str | Path) -> list[Path]:
    """The files that entries come from. Raises MmembedError when there is no such source."""
    path = Path(source)
    if path.is_dir():
        return _data_files(path) or _image_files(path)
    if path.is_file():
        return [path]
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise MmembedError(
        f"{source}: there is no such file or folder; {nearest(path.name, beside) if beside else 'check the path'}"
    )


def count_entries(source: str | Path, field: Field = "documents") -> int | None:
    """How many entries a source will give, for a progress bar; None where only reading it all would tell."""
    path = Path(source)
    if path.is_dir() and not _data_files(path):
        return len(_image_files(path))
    counts = [_count(file, field) for file in source_files(path)]
    return None if None in counts else sum(filter(None, counts))


def media_root(source: str | Path) -> Path:
    """The folder that relative paths of media start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def _read_images(folder: Path) -> Iterator[Entry | RecordError]:
    files = _image_files(folder)
    if not files:
        raise MmembedError(
            f"{folder}: no images here ({', '.join(IMAGE_SUFFIXES)}), no {LINE_SUFFIXES[0]} and {TABLE_SUFFIX} files, "
            "and no encoding.json of `mmembed encode`"
        )
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            check_unicode(name, "the file's name", ascii(str(file)))
            yield Entry(name, {"image": name}, str(file))
        except RecordError as error:
            yield error


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _data_files(folder: Path) -> list[Path]:
    """Of a folder of data. One with images is a folder of images, whatever lies beside them."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith((*LINE_SUFFIXES, TABLE_SUFFIX)) and file.name != TABLE_OF_IMAGES and file.is_file()
    ]
    return [] if files and _image_files(folder) else files


def _count(file: Path, field: Field) -> int | None:
    if file.suffix == TABLE_SUFFIX:
        table = _open_table(file)
        return None if "documents" in table.schema_arrow.names else int(table.metadata.num_rows)
    if file.suffix in COMPRESSED:
        return None
    with file.open("rb") as lines:
        if field == "documents" and b'"documents"' in next(lines, b""):
            return None
        lines.seek(0)
        return sum(not line.isspace() for line in lines)


def _read_rows(files: list[Path], field: Field) -> Iterator[Entry | RecordError]:
    seen: set[str] = set()
    number = -1
    for path in files:
        has_table = (path.parent / TABLE_OF_IMAGES).is_file()
        for where, row in _read_table(path) if path.suffix == TABLE_SUFFIX else read_json_lines(path):
            number += 1
            if isinstance(row, RecordError):
                yield row
                continue
            try:
                entries = (
                    _of_record(row, where, field, number)
                    if "documents" in row
                    else [entry_of_line(row, where, number, has_table)]
                )
            except RecordError as error:
                yield error
                continue
            for entry in entries:
                if "documents" in row and field == "documents":
                    if entry.id in seen:
                        continue
                    seen.add(entry.id)
                yield entry


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:row`, row) of a parquet table, from 1; without what is null."""
    table = _open_table(path)
    names = table.schema_arrow.names
    known = [name for name in names if name in (*_LINE_KEYS, *_RECORD_KEYS)]
    if not {"text", "image", "images", "video", "audio", "title", "documents"} & set(known):
        raise MmembedError(
            f"{path}: no column of contents (text, image, images, video, audio, title, documents) among "
            f"{', '.join(names)}; rename one"
        )
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=known):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", _without_nulls(row)


def _open_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise MmembedError(f"{path}: not a readable parquet file ({error}); restore it") from error


def _without_nulls(value: Any) -> Any:
    """Columns that a row does not have are null in a table, and missing in a line."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _of_record(row: Mapping[str, Any], where: str, field: Field, number: int) -> list[Entry]:
    example = parse_record(row, where)
    if field == "query":
        name, content = example.id or str(number), content_to_json(example.query)
        return [Entry(name, content, where, example.instruction, example.id is not None)]
    return [
        Entry(
            document.id or f"{number}.{index}", content_to_json(document.content), where, named=document.id is not None
        )
        for index, document in enumerate(example.documents)
    ]


def entry_of_line(row: dict[str, Any], where: str, number: int, has_table: bool) -> Entry:
    """The entry of a line that is a content.

    Args:
        number: its id where it brings none.
        has_table: whether `image` may be a row of the `images.parquet` beside the file.

    Raises:
        RecordError: an unknown key, no content, or an unreadable one.
    """
    for key in row:
        if key not in _LINE_KEYS and "_id" not in row:  # a line of a BEIR folder may carry anything, often `metadata`
            raise RecordError(
                where,
                f"unknown key '{key}'",
                nearest(key, (*_LINE_KEYS, "query", "documents")).capitalize(),
                "unknown key",
            )
    content = {key: row[key] for key in CONTENT_KEYS if row.get(key) not in (None, "") and key != "instruction"}
    if row.get("title"):
        content["text"] = " ".join(filter(None, (parse_string(row, key, where) for key in ("title", "text"))))
    if not content:
        raise RecordError(where, "no text, image, video or audio", "Add one or remove the line", "no content")
    parse_content(content, "the line", where)
    image = content.get("image")
    if has_table and isinstance(image, str) and "#" not in image and not Path(image).suffix:
        content["image"] = f"images.parquet#{image}"
    name = str(row.get("id", row.get("_id", number)))
    check_unicode(name, "the id", where)
    instruction = parse_string(row, "instruction", where)
    plain = content["text"] if content.keys() == {"text"} else content
    return Entry(name, plain, where, instruction, "id" in row or "_id" in row)


def entry_of_item(item: Mapping[str, Any]) -> Entry:
    """What a line of an encoded folder stands for, but for an instruction of its own, which the line does not keep."""
    if "content" in item:
        return Entry(item["id"], item["content"], item["id"])
    content = {key: item[key] for key in ("text", "image", "images") if key in item}
    return Entry(item["id"], content["text"] if content.keys() == {"text"} else content, item["id"])
