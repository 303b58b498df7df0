"""The queries and the corpus of one source, read once into a folder; contents that are equal are one row.

Two contents are equal where their texts are (in Unicode's compatible form, case and white space left out) and the
encoded bytes of their pictures, in the same order. Queries are equal with equal instructions; what is positive for one
of them is positive for all.

    records.jsonl    the records, as they will be written again
    queries.jsonl    the distinct queries
    corpus.jsonl     the distinct documents
    media.jsonl      the files of pictures, their sizes and times: when one has changed, all is read again

Cost: one pass over the records (24,000/s), each picture read once; 300 bytes of memory a document while reading.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.mining.retrievers import Item
from data_tools.mining.settings import MiningConfig, MiningSource
from data_tools.mining.shards import digest, write_whole
from mmembed.config.blocks import DataConfig
from mmembed.content import Audio, Content, Example, Image, Task, Text, Video
from mmembed.data.dataset import RecordDataset, locate, media_store
from mmembed.data.format_base import FORMATS
from mmembed.data.records import content_to_json, example_to_record, parse_content, resolve_media
from mmembed.errors import ConfigError, MediaError, RecordError
from mmembed.inference.sources import media_root, read_entries
from mmembed.media import MediaStore
from mmembed.staging import put_in_place, staging

logger = logging.getLogger(__name__)
VERSION = 2  # of what is kept in the folder
Rows = NDArray[np.int64]
_WARNINGS = 5
_EXAMPLES = 20  # of duplicates


class Collection:
    """What was read. All arrays are in the order of the records and of the corpus.

    Attributes:
        query_of: (R,) the query of each record.
        positives: (Q, P) rows of the corpus, -1 where a query has fewer.
        barred: (Q, B) rows that are no negatives to mine: labelled ones, and documents that are the query or show a
            picture of it.
        query_digests, corpus_digests: (Q,) and (N,) of 16 bytes: of everything a model sees.
        corpus_keys: (N,) of 16 bytes: of what equal contents share, wherever they lie.
        summary: counts: records, queries, documents, duplicates, skipped, kinds of media with a place where one is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary: dict[str, Any] = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        with np.load(folder / "arrays.npz") as arrays:
            self.query_of: Rows = arrays["query_of"]
            self.query_digests, self.corpus_digests = arrays["query_digests"], arrays["corpus_digests"]
            self.corpus_keys = arrays["corpus_keys"]
            self.positives = _padded(arrays["positive_starts"], arrays["positive_rows"])
            self.barred = _padded(arrays["barred_starts"], arrays["barred_rows"])
            self._documents = arrays["document_starts"], arrays["document_rows"]
            self._starts = {name: arrays[f"{name}_places"] for name in ("records", "queries", "corpus")}

    def __len__(self) -> int:
        """N, the documents."""
        return len(self.corpus_digests)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """(Q,) numbers that are a query's own."""
        return np.ascontiguousarray(self.query_digests.view(np.uint8).reshape(-1, 16)[:, :8]).view("<u8").reshape(-1)

    def items(self, name: str, rows: Any) -> list[Item]:
        """Queries or documents ("queries", "corpus")."""
        return [Item(**json.loads(line)) for line in self._lines(name, rows)]

    def records(self) -> Iterator[tuple[dict[str, Any], Rows]]:
        """Each record, and the rows of its documents."""
        starts, rows = self._documents
        for number, line in enumerate(self._lines("records", np.arange(len(self.query_of)))):
            yield json.loads(line), rows[starts[number] : starts[number + 1]]

    def media_files(self) -> list[str]:
        """The files of all pictures and sounds."""
        with (self.folder / "media.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line)[0] for line in lines]

    def _lines(self, name: str, rows: Any) -> Iterator[bytes]:
        with (self.folder / f"{name}.jsonl").open("rb") as file:
            for row in np.asarray(rows).tolist():
                file.seek(int(self._starts[name][row]))
                yield file.readline()


def collect(config: MiningConfig, source: MiningSource, folder: Path) -> tuple[Collection, MediaStore]:
    """Reads a source, or finds it read, below `folder`.

    Raises:
        MmembedError: as the data set does; a document or picture that cannot be used, unless it is to be skipped; STS
            records, which grade pairs.
    """
    media_folder = None if config.media_root is None else str(Path(config.media_root).absolute())
    root = str(config.below_root("."))
    data = DataConfig(root=root, media_root=media_folder, media_limits=config.media_limits, train=(source.records,))
    store = media_store(data)
    extra = [config.below_root(path) for path in source.corpus]
    also = [*store.also, *(media_root(path) for path in extra)]
    store = MediaStore(media_folder, config.limits, also=also)
    path = locate(source.records, root)
    files = FORMATS.build({"type": source.format, **source.options}).files(path)
    for one in extra:
        if not one.exists():
            raise ConfigError(f"sources '{source.title}': corpus: there is no {one}; check the path, or set root")
        files += [one] if one.is_file() else sorted(file for file in one.rglob("*") if file.is_file())
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    settings = source.records.model_dump(mode="json")
    key = digest(VERSION, settings, list(map(str, extra)), stamps, media_folder, config.on_bad_record)
    dataset = RecordDataset(source.records, store, config.on_bad_record, root=root)
    reader = _Reader(store, config.on_bad_record)
    home = folder / f"collection-{key[:16]}"
    if not _unchanged(home):
        with staging(home) as work:
            work.mkdir()
            summary = reader.read(dataset, extra, work)
            write_whole(work / "complete.json", json.dumps(summary, ensure_ascii=False, indent=1).encode())
            put_in_place(work, home)
        for old in folder.glob("collection-*"):
            if old != home:
                shutil.rmtree(old)
    return Collection(home), store


class _Reader:
    """Fills the folder of a collection."""

    def __init__(self, media: MediaStore, on_bad_record: str) -> None:
        self.media, self.on_bad_record = media, on_bad_record
        self.rows: dict[bytes, int] = {}  # key of a content -> row of the corpus
        self.queries: dict[bytes, int] = {}
        self.query_contents: list[tuple[bytes, list[bytes]]] = []  # key and pictures of each query
        self.corpus_digests: list[bytes] = []
        self.query_digests: list[bytes] = []
        self.shown: dict[bytes, list[int]] = {}  # picture -> rows of the corpus
        self.pictures: dict[str, bytes] = {}  # reference -> digest
        self.files: dict[str, list[Any]] = {}
        self.kinds: dict[str, dict[str, str]] = {"queries": {}, "corpus": {}}
        self.skipped: Counter[str] = Counter()
        self.ids: list[str | None] = []  # of the corpus
        self.duplicates: dict[str, dict[str, str]] = {}  # id -> what it is equal to

    def read(self, dataset: RecordDataset, extra: list[Path], work: Path) -> dict[str, Any]:
        positives: list[dict[int, None]] = []
        labelled: list[dict[int, None]] = []
        query_of: list[int] = []
        documents: list[list[int]] = []  # rows of the documents of each record
        places: dict[str, list[int]] = {"records": [], "queries": [], "corpus": []}
        names = ("records", "queries", "corpus")
        outputs = [(work / f"{name}.jsonl").open("wb") for name in names]
        files = dict(zip(names, outputs, strict=True))
        try:
            bar = tqdm(range(len(dataset)), desc=f"reading {dataset.name}", unit=" records", delay=3)
            for index in bar:
                example = dataset[index]
                if example.task is Task.STS:
                    raise ConfigError(
                        f"{example.where}: an STS record grades a pair and has no negatives; set task: retrieval of "
                        "the source to take what is related for a positive"
                    )
                query = self._query(example, files["queries"], places["queries"])
                if query == len(positives):
                    positives.append({})
                    labelled.append({})
                query_of.append(query)
                documents.append([])
                for document in example.documents:
                    item = Item(content_to_json(document.content), None, document.id, example.where)
                    row = self._document(document.content, item, files["corpus"], places["corpus"])
                    documents[-1].append(row)
                    (positives if document.relevance > 0 else labelled)[query][row] = None
                _put(files["records"], places["records"], example_to_record(dataclasses.replace(example, source="")))
            for path in extra:
                self._extra(path, files["corpus"], places["corpus"])
        finally:
            for file in outputs:
                file.close()
        barred = self._barred(positives, labelled)
        arrays = dict(zip(("positive_starts", "positive_rows"), _flat([list(one) for one in positives]), strict=True))
        arrays |= dict(zip(("barred_starts", "barred_rows"), _flat(barred), strict=True))
        arrays |= dict(zip(("document_starts", "document_rows"), _flat(documents), strict=True))
        arrays |= {f"{name}_places": np.array(found, np.int64) for name, found in places.items()}
        arrays["query_of"] = np.array(query_of, np.int64)
        arrays["query_digests"] = np.frombuffer(b"".join(self.query_digests), "V16")
        arrays["corpus_digests"] = np.frombuffer(b"".join(self.corpus_digests), "V16")
        arrays["corpus_keys"] = np.frombuffer(b"".join(self.rows), "V16")
        np.savez(work / "arrays.npz", **arrays)  # type: ignore[arg-type]
        with (work / "media.jsonl").open("w", encoding="utf-8") as listed:
            listed.writelines(json.dumps([name, *stamp]) + "\n" for name, stamp in self.files.items())
        return {
            "records": len(query_of),
            "queries": len(self.queries),
            "documents": len(self.rows),
            "duplicates": len(self.duplicates),
            "duplicate_examples": list(self.duplicates.values())[:_EXAMPLES],
            "skipped": dict(dataset.skipped + self.skipped),
            "kinds": self.kinds,
        }

    def _query(self, example: Example, file: BinaryIO, places: list[int]) -> int:
        key, pictures = self._key(example.query, example.where)
        named = blake2b(key + json.dumps(example.instruction).encode(), digest_size=16).digest()
        if named not in self.queries:
            self.queries[named] = len(self.queries)
            self.query_contents.append((key, pictures))
            item = Item(content_to_json(example.query), example.instruction, example.id, example.where)
            self._note("queries", example.query, example.where)
            self.query_digests.append(_seen(item, pictures))
            _put(file, places, dataclasses.asdict(item))
        return self.queries[named]

    def _document(self, content: Content, item: Item, file: BinaryIO, places: list[int]) -> int:
        """Its row, which is that of the first document with this content."""
        key, pictures = self._key(content, item.where)
        if key in self.rows:
            first = self.ids[self.rows[key]]
            if item.id is not None and first is not None and item.id != first and item.id not in self.duplicates:
                self.duplicates[item.id] = {"id": item.id, "equal_to": first, "where": item.where}
            return self.rows[key]
        row = self.rows[key] = len(self.rows)
        for picture in pictures:
            self.shown.setdefault(picture, []).append(row)
        self.ids.append(item.id)
        self._note("corpus", content, item.where)
        self.corpus_digests.append(_seen(item, pictures))
        _put(file, places, dataclasses.asdict(item))
        return row

    def _extra(self, path: Path, file: BinaryIO, places: list[int]) -> None:
        base = self.media.root if self.media.root is not None else media_root(path).resolve()
        usable = 0
        bar = tqdm(read_entries(path), desc=f"reading {path.name}", unit=" documents", delay=3)
        for entry in bar:
            try:
                if isinstance(entry, RecordError):
                    raise entry
                content = parse_content(resolve_media(entry.content, base), "the document", entry.where)
                item = Item(content_to_json(content), entry.instruction, entry.id, entry.where)
                self._document(content, item, file, places)
                usable += 1
            except RecordError as error:
                if self.on_bad_record == "raise":
                    raise
                self.skipped[error.kind] += 1
                if sum(self.skipped.values()) <= _WARNINGS:
                    logger.warning("skipped %s", error)
        if not usable:
            raise ConfigError(f"{path}: no usable document ({dict(self.skipped) or 'the source is empty'})")

    def _barred(self, positives: list[dict[int, None]], labelled: list[dict[int, None]]) -> list[list[int]]:
        barred = []
        for (key, pictures), right, wrong in zip(self.query_contents, positives, labelled, strict=True):
            rows = dict(wrong)
            if key in self.rows:
                rows[self.rows[key]] = None
            for picture in pictures:
                rows |= dict.fromkeys(self.shown.get(picture, ()))
            barred.append([row for row in rows if row not in right])
        return barred

    def _key(self, content: Content, where: str) -> tuple[bytes, list[bytes]]:
        """What equal contents share, and the digests of the pictures."""
        parts, pictures = [], []
        for part in content:
            if isinstance(part, Text):
                plain = " ".join(unicodedata.normalize("NFKC", part.text).casefold().split())
                parts.append(b"t" + plain.encode())
            elif isinstance(part, Audio):
                parts.append(b"a" + self._sound(part, where))
            else:
                found = [self._picture(one, where) for one in (part.frames if isinstance(part, Video) else (part,))]
                parts.append((b"v" if isinstance(part, Video) else b"i") + b"".join(found))
                pictures += found
        state = blake2b(digest_size=16)
        for one in parts:
            state.update(len(one).to_bytes(8, "little") + one)
        return state.digest(), pictures

    def _picture(self, image: Image, where: str) -> bytes:
        reference = str(image.source)
        if reference not in self.pictures:
            self._list(reference)
            try:
                if self.on_bad_record == "skip":
                    self.media.check(image, decode=True)
                self.pictures[reference] = self.media.digest(image)
            except MediaError as error:
                remedy = "To go on without such records set on_bad_record: skip"
                raise RecordError(where, str(error), remedy, f"image {error.kind}") from None
        return self.pictures[reference]

    def _sound(self, audio: Audio, where: str) -> bytes:
        try:
            self._list(str(audio.source))
            return blake2b(Path(str(audio.source)).read_bytes(), digest_size=16).digest()
        except OSError as error:
            found, remedy = f"{audio.source}: {error.strerror}", "Restore the file, or set on_bad_record: skip"
            raise RecordError(where, found, remedy, "audio unreadable") from None

    def _list(self, reference: str) -> None:
        name = reference.rpartition("#")[0] if ".parquet#" in reference else reference
        if name not in self.files:
            self.files[name] = _stamp(name)

    def _note(self, side: str, content: Content, where: str) -> None:
        for part in content:
            self.kinds[side].setdefault(type(part).__name__.lower(), where)


def _seen(item: Item, pictures: list[bytes]) -> bytes:
    """Of everything that a model sees: the words as they stand, the pictures, the instruction."""
    return bytes.fromhex(digest(item.content, item.instruction, b"".join(pictures)))


def _put(file: BinaryIO, places: list[int], value: dict[str, Any]) -> None:
    places.append(file.tell())
    file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def _flat(lists: list[list[int]]) -> tuple[Rows, Rows]:
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return starts, np.array([row for one in lists for row in one], np.int64)


def _padded(starts: Rows, rows: Rows) -> Rows:
    """(Q + 1,), (n,) -> (Q, most)."""
    lengths = np.diff(starts)
    padded = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = rows
    return padded


def _unchanged(folder: Path) -> bool:
    """Whether the collection is there, and its pictures are the same files."""
    if not (folder / "complete.json").exists():
        return False
    with (folder / "media.jsonl").open(encoding="utf-8") as lines:
        return all(_stamp(name) == stamp for name, *stamp in map(json.loads, lines))


def _stamp(name: str) -> list[Any]:
    try:
        found = Path(name).stat()
    except (OSError, ValueError):  # gone, or a URL
        return [None, None]
    return [found.st_size, found.st_mtime_ns]
