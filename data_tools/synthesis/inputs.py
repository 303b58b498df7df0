"""What a pipeline begins with: documents, queries or records, as items with ids, in a file of their own.

An item without an id is called by its source and place. An id that stands twice is kept once: the second item is left
out and counted. Paths of media become absolute, because the items move to another folder; every picture is opened once,
so that a broken one is found now and not when a server is asked about it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.files import digest, stamps, write_whole
from data_tools.synthesis.settings import SynthesisConfig, SynthesisSource
from data_tools.synthesis.stages import Item, Items
from data_tools.synthesis.templates import pictures_of
from mmembed.config.blocks import SourceConfig
from mmembed.content import Image
from mmembed.data.dataset import locate
from mmembed.data.format_base import FORMATS
from mmembed.data.records import parse_record, resolve_media, with_title
from mmembed.errors import MediaError, MmembedError, RecordError
from mmembed.inference.sources import media_root, read_entries
from mmembed.media import MediaStore
from mmembed.progress import bar
from mmembed.staging import staging

VERSION = 1
FILE = "inputs.jsonl"
_WARNINGS = 5
_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass
class Inputs:
    """The items, why others were left out, and where a few of those are."""

    items: Items
    key: str
    left_out: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)


def media_of(config: SynthesisConfig) -> MediaStore:
    """Opens what lies below `media_root`, `root` and the sources."""
    folders = [media_root(config.below_root(source.path)) for source in config.sources]
    also = [*folders, *([] if config.root is None else [config.below_root(".")])]
    return MediaStore(config.media_root, config.limits, also=also)


def collect(config: SynthesisConfig, media: MediaStore, work: Path) -> Inputs:
    """Reads the sources, or finds them read, in `work`.

    Raises:
        MmembedError: a source that is not there; the first bad record, unless they are to be skipped.
    """
    key, note = _key(config), work / "inputs.json"
    if note.exists():
        noted = json.loads(note.read_text(encoding="utf-8"))
        if noted["key"] == key and (work / FILE).exists():
            return Inputs(Items(work / FILE, noted["count"]), key, Counter(noted["left_out"]), noted["first"])
    note.unlink(missing_ok=True)
    inputs, count = Inputs(Items(work / FILE, 0), key), 0
    with staging(work / FILE) as staged:
        with staged.open("wb") as file, bar("read", None, " items") as shown:
            for item in _distinct(config, media, inputs):
                file.write(_ENCODER.encode(item).encode() + b"\n")
                count += 1
                shown.update()
        staged.replace(work / FILE)
    if not count:
        raise RecordError(config.sources[0].path, "nothing is left to work on", "Give sources with content", "no items")
    inputs.items = Items(work / FILE, count)
    kept = {"key": key, "count": count, "left_out": inputs.left_out, "first": inputs.first}
    write_whole(note, json.dumps(kept).encode())
    return inputs


def _distinct(config: SynthesisConfig, media: MediaStore, inputs: Inputs) -> Iterator[Item]:
    """The items of all sources."""
    seen: set[str] = set()
    for number, source in enumerate(config.sources):
        prefix = f"{number}/" if len(config.sources) > 1 else ""
        for item in _sampled(source, config):
            try:
                if isinstance(item, RecordError):
                    raise item
                where, item["id"] = item.pop("where"), f"{prefix}{item['id']}"
                for content in _contents(item):
                    for picture in _pictures(content, where):
                        media.check(Image(picture))
                if item["id"] in seen:
                    raise RecordError(
                        where, f"a second item with the id '{item['id']}'", "Give it its own", "duplicate id"
                    )
            except (RecordError, MediaError) as error:
                _leave_out(error, config, inputs)
                continue
            seen.add(item["id"])
            yield item


def _pictures(content: Any, where: str) -> list[str]:
    try:
        return pictures_of(content)
    except MmembedError as error:
        raise RecordError(where, str(error), "Remove the medium or the item", "unreadable content") from None


def _leave_out(error: RecordError | MediaError, config: SynthesisConfig, inputs: Inputs) -> None:
    """Duplicates are never a reason to stop: the first one is there."""
    if config.on_bad_record == "raise" and error.kind != "duplicate id":
        raise error
    inputs.left_out[error.kind] += 1
    if len(inputs.first) < _WARNINGS:
        inputs.first.append(str(error))


def _sampled(source: SynthesisSource, config: SynthesisConfig) -> Iterator[Item | RecordError]:
    if source.max_examples is None:
        yield from _read(source, config)
        return
    count = sum(1 for _ in _read(source, config))
    chosen = set(random.Random(config.seed).sample(range(count), min(source.max_examples, count)))
    for place, item in enumerate(_read(source, config)):
        if place in chosen:
            yield item


def _read(source: SynthesisSource, config: SynthesisConfig) -> Iterator[Item | RecordError]:
    if source.kind == "records":
        yield from _records(source, config)
        return
    path = config.below_root(source.path)
    folder = Path(config.media_root).absolute() if config.media_root else media_root(path)
    for entry in read_entries(path, "documents" if source.kind == "documents" else "query"):
        if isinstance(entry, RecordError):
            yield entry
            continue
        key = "content" if source.kind == "documents" else "query"
        item: Item = {"id": entry.id, key: resolve_media(entry.content, folder), "source": source.title}
        if source.kind == "queries":
            item |= _told(source, entry.instruction)
        yield {**item, "where": entry.where}


def _records(source: SynthesisSource, config: SynthesisConfig) -> Iterator[Item | RecordError]:
    path = locate(SourceConfig(path=source.path), config.root).absolute()
    folder = Path(config.media_root).absolute() if config.media_root else media_root(path)
    for number, record in enumerate(FORMATS.build({"type": source.format, **source.options}).read(path)):
        if isinstance(record, RecordError):
            yield record
            continue
        where = record.get("where", f"{path}:{number + 1}")
        try:
            parse_record(record, where)
        except RecordError as error:
            yield error
            continue
        item = {**record, "query": resolve_media(record["query"], folder), "where": where}
        item["documents"] = [
            {**one, "content": resolve_media(with_title(one, "a document", where), folder)}
            for one in record["documents"]
        ]
        for document in item["documents"]:
            document.pop("title", None)
        item["id"] = record.get("id") or f"{path.stem}-{number + 1}"
        item["source"] = record.get("source") or source.title
        yield {**item, **_told(source, record.get("instruction"))}


def _told(source: SynthesisSource, instruction: str | None) -> dict[str, Any]:
    told = {"instruction": instruction or source.instruction, "task": source.task and source.task.value}
    return {key: value for key, value in told.items() if value is not None}


def _contents(item: Item) -> list[Any]:
    own = [item[key] for key in ("content", "query") if key in item]
    return own + [document["content"] for document in item.get("documents", [])]


def _key(config: SynthesisConfig) -> str:
    found = []
    for source in config.sources:
        path = config.below_root(source.path)
        if source.kind == "records" and path.exists():
            found += stamps(FORMATS.build({"type": source.format, **source.options}).files(path))
        elif path.exists():
            found += stamps([path])
    read = config.model_dump(mode="json", include={"root", "media_root", "media_limits", "sources", "on_bad_record"})
    return digest(VERSION, read, config.seed, found)
