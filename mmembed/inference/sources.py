"""What `mmembed encode` and `mmembed search` read: a folder of images, or JSON lines.

A line is a content (`{"text": ..., "image": ...}`, with an optional `id` or `_id`, `title` and `instruction`) or a
canonical record of training data, of which one side is taken: the queries, or the documents (each id once). In a BEIR
folder `image` may be the id of a row of the `images.parquet` beside the file. Entries come one at a time, in order;
memory does not depend on the size of the source, but for the ids of documents already seen.
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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LINE_KEYS = (*CONTENT_KEYS, "id", "_id", "title")


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
        source: a folder of images (searched with its subfolders, sorted by path), or a `.jsonl` file.
        field: which side of a canonical record.

    Raises:
        MmembedError: there is no such source, or a folder without images.
    """
    path = Path(source)
    if path.is_dir():
        return _read_images(path)
    if path.is_file():
        return _read_lines(path, field)
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise MmembedError(
        f"{source}: there is no such file or folder; {nearest(path.name, beside) if beside else 'check the path'}"
    )


def count_entries(source: str | Path, field: Field = "documents") -> int | None:
    """How many entries a source will give, for a progress bar; None where only reading it all would tell."""
    path = Path(source)
    if path.is_dir():
        return len(_image_files(path))
    if path.suffix in COMPRESSED:
        return None
    with path.open("rb") as lines:
        if field == "documents" and b'"documents"' in next(lines, b""):
            return None
        lines.seek(0)
        return sum(not line.isspace() for line in lines)


def media_root(source: str | Path) -> Path:
    """The folder that relative paths of media start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def _read_images(folder: Path) -> Iterator[Entry | RecordError]:
    files = _image_files(folder)
    if not files:
        raise MmembedError(
            f"{folder}: no images here ({', '.join(IMAGE_SUFFIXES)}), and no encoding.json of `mmembed encode`"
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


def _read_lines(path: Path, field: Field) -> Iterator[Entry | RecordError]:
    has_table = (path.parent / "images.parquet").is_file()
    seen: set[str] = set()
    for number, (where, row) in enumerate(read_json_lines(path)):
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
