"""The queries and the corpus of one source, read once into a folder; contents that are equal are one row.

Two contents are equal where their texts are (in Unicode's compatible form, case and white space left out) and the
encoded bytes of their pictures, in the same order. Queries are equal with equal instructions; what is positive for one
of them is positive for all. An id names one document throughout a source, its further corpus included: other wordings
of a query's documents are no negatives of it.

    records.jsonl    the records, as they will be written again
    queries.jsonl    the distinct queries
    corpus.jsonl     the distinct documents
    media.jsonl      the files of pictures, their sizes and times: when one has changed, all is read again

Cost: one pass over the records (20,000/s) and lines of further corpora (70,000/s), each picture read once; 400 bytes of
memory a document while reading.
"""

from __future__ import annotations

import json
import logging
import mmap
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.files import digest, write_whole
from data_tools.mining.retrievers import Item
from data_tools.mining.settings import MiningSource, RecordsConfig
from mmembed.config.blocks import DataConfig
from mmembed.content import Audio, Content, Example, Image, Task, Text, Video, to_content
from mmembed.data.dataset import RecordDataset, locate, media_store
from mmembed.data.format_base import FORMATS
from mmembed.data.records import content_to_json, example_to_record, parse_content, resolve_media
from mmembed.errors import ConfigError, MediaError, RecordError
from mmembed.inference.sources import Entry, count_entries, media_root, read_entries
from mmembed.media import MediaStore
from mmembed.progress import bar
from mmembed.staging import put_in_place, staging

logger = logging.getLogger(__name__)
VERSION = 3  # of what is kept in the folder
FILES = ("records", "queries", "corpus")
Rows = NDArray[np.int64]
_WARNINGS = 5
_EXAMPLES = 20  # of copies
_PLAIN = json.JSONEncoder(ensure_ascii=False)  # kept: json.dumps with an option builds one at every call


class Collection:
    """What was read. All arrays are in the order of the records and of the corpus.

    Attributes:
        query_of: (R,) the query of each record.
        positives: (Q, P) rows of the corpus, -1 where a query has fewer.
        barred: (Q, B) rows that are no negatives to mine: labelled ones, what shares an id with a document of the
            query, and documents that are the query or show a picture of it.
        named: (N,) which documents have ids of their own; others are called by their place.
        query_digests, corpus_digests: (Q,) and (N,) of 16 bytes: of everything a model sees.
        corpus_keys: (N,) of 16 bytes: of what equal contents share, wherever they lie.
        summary: counts: records, queries, documents, duplicates (copies of one of the documents), left_out (labelled
            negatives that are copies of a positive of their query), skipped, kinds of media with a place where one is.
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
            self.named = arrays["named"]
            self._documents = arrays["document_starts"], arrays["document_rows"], arrays["document_kept"]
            self._places: dict[str, Rows] = {name: arrays[f"{name}_places"] for name in FILES}
        self._mapped: dict[str, mmap.mmap] = {}

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
        """Each record, and the rows of its documents, without labelled negatives that are copies of a positive."""
        starts, rows, kept = self._documents
        all_kept = bool(kept.all())
        for number, line in enumerate(self._lines("records", np.arange(len(self.query_of)))):
            record, at = json.loads(line), slice(starts[number], starts[number + 1])
            if not all_kept:
                record["documents"] = [one for one, left in zip(record["documents"], kept[at], strict=True) if left]
            yield record, rows[at] if all_kept else rows[at][kept[at]]

    def media_files(self) -> list[str]:
        """The files of all pictures and sounds."""
        with (self.folder / "media.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line)[0] for line in lines]

    def _lines(self, name: str, rows: Any) -> Iterator[str]:
        if name not in self._mapped:
            with (self.folder / f"{name}.jsonl").open("rb") as file:
                self._mapped[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole, places, chosen = self._mapped[name], self._places[name], np.asarray(rows, np.int64)
        for start, stop in zip(places[chosen].tolist(), places[chosen + 1].tolist(), strict=True):
            yield whole[start:stop].decode()


def collect(config: RecordsConfig, source: MiningSource, folder: Path) -> tuple[Collection, MediaStore]:
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
    reader = _Reader(store, config.on_bad_record, source.document_instruction)
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


class _Lines:
    """A file of JSON lines that is written, and where each line starts."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.places = [0]

    def add(self, value: dict[str, Any]) -> None:
        line = _PLAIN.encode(value).encode() + b"\n"
        self._file.write(line)
        self.places.append(self.places[-1] + len(line))

    def close(self) -> None:
        self._file.close()


class _Reader:
    """Fills the folder of a collection."""

    def __init__(self, media: MediaStore, on_bad_record: str, instruction: str | None) -> None:
        self.media, self.on_bad_record = media, on_bad_record
        self.instruction = instruction  # of documents without one of their own
        self.rows: dict[bytes, int] = {}  # key of a content -> row of the corpus
        self.queries: dict[bytes, int] = {}
        self.query_contents: list[tuple[bytes, list[bytes]]] = []  # key and pictures of each query
        self.positives: list[dict[int, None]] = []  # rows, of each query
        self.labelled: list[dict[int, None]] = []
        self.query_of: list[int] = []
        self.documents: list[list[int]] = []  # rows, of each record
        self.negative: list[bool] = []  # of all documents of records
        self.corpus_digests: list[bytes] = []
        self.query_digests: list[bytes] = []
        self.shown: dict[bytes, list[int]] = {}  # picture -> rows of the corpus
        self.pictures: dict[str, bytes] = {}  # reference -> digest
        self.files: dict[str, list[Any]] = {}
        self.kinds: dict[str, dict[str, str]] = {"queries": {}, "corpus": {}}
        self.skipped: Counter[str] = Counter()
        self.named: list[bool] = []  # of the corpus: whether what stands there has an id
        self.ids: list[str | None] = []  # the first one of each row
        self.row_of: dict[str, int] = {}  # id -> the first row with it
        self.wordings: dict[str, set[int]] = {}  # id -> its rows, of ids with several
        self.listed: set[int] = set()  # rows of further corpora that have no id
        self.copies = 0
        self.copy_examples: list[tuple[Item, bool, int]] = []  # whether it has an id, and the row that it is equal to

    def read(self, dataset: RecordDataset, extra: list[Path], work: Path) -> dict[str, Any]:
        lines = {name: _Lines(work / f"{name}.jsonl") for name in FILES}
        try:
            with bar(f"read {dataset.name}", len(dataset), " records") as shown:
                for index in range(len(dataset)):
                    self._record(dataset[index], lines)
                    shown.update()
            for path in extra:
                self._extra(path, lines["corpus"])
        finally:
            for one in lines.values():
                one.close()
        arrays: dict[str, NDArray[Any]] = {}
        arrays |= dict(zip(("positive_starts", "positive_rows"), _flat(list(map(list, self.positives))), strict=True))
        arrays |= dict(zip(("barred_starts", "barred_rows"), _flat(self._barred()), strict=True))
        arrays |= dict(zip(("document_starts", "document_rows"), _flat(self.documents), strict=True))
        arrays |= {f"{name}_places": np.array(one.places, np.int64) for name, one in lines.items()}
        arrays["document_kept"] = self._kept()
        arrays["query_of"] = np.array(self.query_of, np.int64)
        arrays["named"] = np.array(self.named)
        arrays["query_digests"] = np.frombuffer(b"".join(self.query_digests), "V16")
        arrays["corpus_digests"] = np.frombuffer(b"".join(self.corpus_digests), "V16")
        arrays["corpus_keys"] = np.frombuffer(b"".join(self.rows), "V16")
        np.savez(work / "arrays.npz", **arrays)  # type: ignore[arg-type]
        with (work / "media.jsonl").open("w", encoding="utf-8") as listed:
            listed.writelines(json.dumps([name, *stamp]) + "\n" for name, stamp in self.files.items())
        return {
            "records": len(self.query_of),
            "queries": len(self.queries),
            "documents": len(self.rows),
            "duplicates": self.copies,
            "duplicate_examples": self._examples(work, lines["corpus"].places),
            "left_out": int((~arrays["document_kept"]).sum()),
            "skipped": dict(dataset.skipped + self.skipped),
            "kinds": self.kinds,
        }

    def _record(self, example: Example, lines: dict[str, _Lines]) -> None:
        if example.task is Task.STS:
            raise ConfigError(
                f"{example.where}: an STS record grades a pair and has no negatives; set task: retrieval of "
                "the source to take what is related for a positive"
            )
        record = example_to_record(example)
        record.pop("source", None)  # the source that it is read from gives it a name
        query = self._query(example, record["query"], lines["queries"])
        rows = []
        for document, written in zip(example.documents, record["documents"], strict=True):
            item = Item(written["content"], self.instruction, document.id, example.where)
            row = self._document(document.content, item, document.id is not None, lines["corpus"])
            rows.append(row)
            self.negative.append(document.relevance == 0)
            (self.positives if document.relevance > 0 else self.labelled)[query][row] = None
        self.query_of.append(query)
        self.documents.append(rows)
        lines["records"].add(record)

    def _query(self, example: Example, content: Any, lines: _Lines) -> int:
        key, pictures = self._key(example.query, example.where)
        named = blake2b(key + json.dumps(example.instruction).encode(), digest_size=16).digest()
        if named not in self.queries:
            self.queries[named] = len(self.queries)
            self.query_contents.append((key, pictures))
            self.positives.append({})
            self.labelled.append({})
            item = Item(content, example.instruction, example.id, example.where)
            self._note("queries", example.query, example.where)
            self.query_digests.append(_seen(item, pictures))
            lines.add(vars(item))
        return self.queries[named]

    def _document(self, content: Content, item: Item, named: bool, lines: _Lines, listed: bool = False) -> int:
        """Its row, which is that of the first document with this content.

        Args:
            named: it has an id. listed: it is of a further corpus, where each document stands once.
        """
        key, pictures = self._key(content, item.where)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = len(self.rows)
            for picture in pictures:
                self.shown.setdefault(picture, []).append(row)
            self.named.append(named)
            self.ids.append(None)
            self._note("corpus", content, item.where)
            self.corpus_digests.append(_seen(item, pictures))
            lines.add(vars(item))
        elif not self._again(row, item, named, pictures, listed):
            self.copies += 1
            if len(self.copy_examples) < _EXAMPLES:
                self.copy_examples.append((item, named, row))
        if listed and not named:
            self.listed.add(row)
        if named and item.id is not None:
            self.ids[row] = self.ids[row] or item.id
            first = self.row_of.setdefault(item.id, row)
            if first != row:
                self.wordings.setdefault(item.id, {first}).add(row)
        return row

    def _again(self, row: int, item: Item, named: bool, pictures: list[bytes], listed: bool) -> bool:
        """Whether this is the document of the row once more, and no copy of it: its id is known, or neither has one
        and it stands there letter for letter."""
        if named and self.ids[row] is not None:
            return self.row_of.get(str(item.id)) == row or row in self.wordings.get(str(item.id), ())
        return not (listed and row in self.listed) and _seen(item, pictures) == self.corpus_digests[row]

    def _examples(self, work: Path, places: list[int]) -> list[dict[str, Any]]:
        """Of copies: ids, or the place of what has none."""
        found = []
        with (work / "corpus.jsonl").open("rb") as corpus:
            for item, named, row in self.copy_examples:
                corpus.seek(places[row])
                equal_to = self.ids[row] or json.loads(corpus.readline())["where"]
                found.append({"id": item.id if named else item.where, "equal_to": equal_to, "where": item.where})
        return found

    def _extra(self, path: Path, lines: _Lines) -> None:
        base = self.media.root if self.media.root is not None else media_root(path).resolve()
        usable = 0
        with bar(f"read {path.name}", count_entries(path), " documents") as shown:
            for entry in read_entries(path):
                shown.update()
                try:
                    if isinstance(entry, RecordError):
                        raise entry
                    self._entry(entry, base, lines)
                    usable += 1
                except RecordError as error:
                    if self.on_bad_record == "raise":
                        raise
                    self.skipped[error.kind] += 1
                    if sum(self.skipped.values()) <= _WARNINGS:
                        logger.warning("skipped %s", error)
        if not usable:
            raise ConfigError(f"{path}: no usable document ({dict(self.skipped) or 'the source is empty'})")

    def _entry(self, entry: Entry, base: Path, lines: _Lines) -> None:
        instruction = self.instruction if entry.instruction is None else entry.instruction
        if isinstance(entry.content, str):  # `read_entries` has parsed it
            content, plain = to_content(entry.content), entry.content
        else:
            content = parse_content(resolve_media(entry.content, base), "the document", entry.where)
            plain = content_to_json(content)
        self._document(content, Item(plain, instruction, entry.id, entry.where), entry.named, lines, listed=True)

    def _kept(self) -> NDArray[np.bool_]:
        """Of all documents of records, which are no negatives that are positives of their query."""
        if not any(self.negative):
            return np.ones(len(self.negative), bool)
        right = (row in self.positives[query] for query, rows in zip(self.query_of, self.documents, strict=True)
                 for row in rows)  # fmt: skip
        return np.array([not (wrong and known) for wrong, known in zip(self.negative, right, strict=True)])

    def _barred(self) -> list[list[int]]:
        same: dict[int, set[int]] = {}  # row -> those that share an id with it
        for rows in self.wordings.values():
            for row in rows:
                same.setdefault(row, set()).update(rows)
        barred = []
        for (key, pictures), right, wrong in zip(self.query_contents, self.positives, self.labelled, strict=True):
            found = dict(wrong)
            if key in self.rows:
                found[self.rows[key]] = None
            for picture in pictures:
                found |= dict.fromkeys(self.shown.get(picture, ()))
            for row in (*right, *wrong) if same else ():
                found |= dict.fromkeys(sorted(same.get(row, ())))
            barred.append([row for row in found if row not in right])
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
                found = str(error).removeprefix(f"{where}: ")  # of a folder of pictures
                remedy = "To go on without such records set on_bad_record: skip"
                raise RecordError(where, found, remedy, f"image {error.kind}") from None
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
