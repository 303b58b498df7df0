"""The records of one source as a memory-mapped dataset of examples.

The source is read once: each record is validated, its pictures are checked as far as headers show, and it is written as
one JSON string into an Arrow file in the cache, keyed by the files, the format's options and code, and the source's
settings. The size and time of each checked picture are kept beside it: when one changed, the source is read again.
After that a process holds no records: rows are mapped from disk, ten million of them as cheaply as ten. Costs: reading
24,000 text records/s once (5,000/s where each shows another picture); later a look at the time of each picture, 15 us;
`dataset[i]` 30 us.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

import numpy as np
import torch.utils.data

from mmembed.content import Audio, Content, Example, Image, Task, Video
from mmembed.data.batch_plan import Draw
from mmembed.data.census import Census
from mmembed.data.format_base import FORMATS, Format, RawRecord
from mmembed.data.labels import Grades
from mmembed.data.pair_base import PairMaker, code_of, maker_of, text_of
from mmembed.data.records import (
    MEDIA_KINDS,
    is_untrainable_pair,
    parse_document,
    parse_record,
    resolve_media,
    without_media,
)
from mmembed.errors import ConfigError, MediaError, RecordError
from mmembed.media import MediaLimits, MediaStore, build_once, default_cache_dir
from mmembed.progress import bar

if TYPE_CHECKING:
    import pyarrow as pa

    from mmembed.config.blocks import DataConfig, SourceConfig
    from mmembed.data.streaming import RecordStream

logger = logging.getLogger(__name__)
PICTURES = "pictures.jsonl"
KEYS = ("query_key", "positive_key")
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # kept: json.dumps would build one a record
BATCH = 1000  # records that are written at a time
_SAMPLE_SEED = 0
_CHECKED = 1_000_000  # hashes, 60 MB
Used = TypeVar("Used")
_WARNINGS = 5  # bad records that are shown one by one


def media_store(data: DataConfig) -> MediaStore:
    """The MediaStore of a run: within `media_limits` it opens what lies below `media_root`, `root` and the folders of
    the sources, no more.

    Give the same one to the datasets and to the preprocessor.
    """
    folders = [_folder(locate(source, data.root)) for source in (*data.train, *data.dev)]
    limits = MediaLimits(**data.media_limits.model_dump())
    return MediaStore(data.media_root, limits, also=[*([data.root] if data.root else []), *folders])


def open_dev(data: DataConfig, media: MediaStore) -> list[RecordDataset]:
    """The dev sources of a run. Raises as `RecordDataset`."""
    return [
        RecordDataset(source, media, data.on_bad_record, root=data.root, ignored=data.ignore_fields)
        for source in data.dev
    ]


def locate(source: SourceConfig, root: str | Path | None) -> Path:
    """Where a source lies. Raises ConfigError when it is not there."""
    path = Path(source.path) if root is None else Path(root) / source.path
    if not path.exists():
        raise ConfigError(f"data source '{source.path}': there is no {path}; check the path, or set data.root")
    return path


def base_folder(path: Path, media: MediaStore | None) -> Path:
    """Where relative paths of pictures start."""
    return media.root if media is not None and media.root is not None else _folder(path)


class RecordDataset(torch.utils.data.Dataset[Example]):
    """One source of examples.

    Args:
        source: path, format, options, and what overrides the records (instruction, task, name, max_examples).
        media: opens pictures to check them; None leaves them unchecked. Relative paths in records start from its root,
            else from the folder of the record file.
        on_bad_record: `raise` at the first bad record, or `skip` it, count it in `skipped` and log it. To skip, all
            pictures are decoded once while reading, so that none fails hours later.
        cache_dir: where the Arrow file lies; default `mmembed.media.default_cache_dir()`.
        root: what `source.path` is relative to.
        ignored: `data.ignore_fields`. Pictures, videos and sounds that it names are taken out of the records; a record
            of which a content is left empty is a bad one.

    Attributes:
        skipped: why and how often records were skipped.
        fields: what the data carries: `score`, `rationale`, `negatives`, `relevance` (graded, but of STS),
            `instruction`, `labels` (`classes` where they say no more than the ids of the positives), `image`, `video`,
            `audio`.
        tasks: the tasks that occur.
        grades: the relevances that occur.
        census: how many records hold how many positives, negatives and teacher's scores; like `grades` of all records,
            those too that `max_examples` leaves out.
        maker: what makes pairs of the rows, which are raw documents; None where they are records with queries. The
            other attributes are those of its pairs.
        untrainable: how many STS records are neither positive nor negative pairs, and `file:line` of the first; of no
            concern to a dev source, and to an objective that takes graded pairs.

    Raises:
        RecordError: the first bad record, under `raise`.
        ConfigError: no such source, format, maker of pairs or option; no usable record at all.
        CacheError: the Arrow file cannot be written: the disk is full.
    """

    def __init__(
        self,
        source: SourceConfig,
        media: MediaStore | None = None,
        on_bad_record: Literal["raise", "skip"] = "raise",
        cache_dir: str | Path | None = None,
        root: str | Path | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        self.source = source
        left_out = ignored_media(ignored)
        path = locate(source, root)
        self.name = source.name
        reader = FORMATS.build({"type": source.format, **source.options})
        self.maker = maker_of(source, ignored)
        base = base_folder(path, media)
        key = _fingerprint(source, reader, self.maker, path, media, base, on_bad_record, left_out)
        builder = _Builder(source, reader, self.maker, path, media, base, on_bad_record, left_out)
        folder = build_once(
            Path(cache_dir or default_cache_dir()) / "records" / key, builder.build, _pictures_unchanged
        )
        summary = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        self.skipped: Counter[str] = Counter(summary["skipped"])
        self.fields = set(summary["fields"])
        self.tasks = {Task(task) for task in summary["tasks"]}
        self.untrainable: tuple[int, str] = tuple(summary["untrainable"])
        self.grades = Grades(*summary["grades"])
        self.census = Census(*summary["census"])
        if self.skipped:
            total = sum(self.skipped.values())
            logger.warning("%s: skipped %d bad records: %s", self.name, total, dict(self.skipped))
        if summary["rows"] == 0:
            raise ConfigError(f"{path}: no usable record ({dict(self.skipped) or 'the source is empty'})")
        if self.maker is not None:
            self.maker.use(folder)
        self._folder = folder
        self._rows = _open(folder)
        self._chosen = _sample(summary["rows"], source.max_examples)

    @property
    def size(self) -> int:
        """Rows; None of a stream."""
        return len(self)

    def __len__(self) -> int:
        return self._rows.num_rows if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        index = index % len(self)
        row = index if self._chosen is None else int(self._chosen[index])
        record, where = self._rows["record"][row].as_py(), self._rows["where"][row].as_py()
        parse = parse_record if self.maker is None else parse_document
        return dataclasses.replace(parse(json.loads(record), where), source=self.name, domain=self.source.domain)

    def keys(self) -> np.ndarray:
        """(N, 2) int64: a hash of the query, and of the first positive (its id, else its content).

        Examples that share one of them do not belong into one batch; see BatchPlan.
        """
        columns = [self._rows[name].to_numpy() for name in KEYS]
        keys = np.stack(columns, axis=1)
        return keys if self._chosen is None else keys[self._chosen]

    def digest(self) -> str:
        """Of the records and their order, as far as their keys tell."""
        return hashlib.blake2b(self.keys().data, digest_size=16).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Changes with the files, how they are read, and which records are taken."""
        return f"{self._folder.name}-{self.digest()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _rows=_open(state["_folder"]))


class MixedDataset(torch.utils.data.Dataset[Example]):
    """Several sources under one index, (source, row, visit): what a BatchPlan yields. Streams have no length.

    Of raw documents it gives the pair of that visit, drawn by `seed`.
    """

    def __init__(self, sources: Sequence[RecordDataset | RecordStream], seed: int = 0) -> None:
        self.sources, self.seed = tuple(sources), seed

    def __len__(self) -> int:
        return sum(source.size or 0 for source in self.sources)

    def __getitem__(self, index: Draw) -> Example:
        source, row, visit = index
        example = self.sources[source][row]
        example = dataclasses.replace(example, visit=example.visit + visit)  # a stream knows its passes itself
        maker = self.sources[source].maker
        return example if maker is None else maker.make(example, self.seed)


def ignored_media(fields: Collection[str]) -> tuple[str, ...]:
    """Of `data.ignore_fields`, the kinds of media: they are taken out of the records."""
    return tuple(kind for kind in MEDIA_KINDS if kind in fields)


def settle(record: RawRecord, source: SourceConfig, base: Path, left_out: Collection[str] = ()) -> RawRecord:
    """The record with absolute media paths, with the source's instruction and task, and without media of the kinds
    `left_out`; `where` is kept apart.

    Raises:
        RecordError: a content has nothing but media that are left out.
    """
    settled = {key: value for key, value in record.items() if key != "where"}
    where = record["where"]
    if "query" in settled:
        settled["query"] = _settled(settled["query"], "query", base, left_out, where)
    if isinstance(settled.get("documents"), list):
        settled["documents"] = [
            {**document, "content": _settled(document["content"], f"documents[{index}]", base, left_out, where)}
            if isinstance(document, dict) and "content" in document
            else document
            for index, document in enumerate(settled["documents"])
        ]
    if source.task is not None:
        settled["task"] = source.task.value
    query = settled.get("query")
    own = settled.get("instruction") or (query.get("instruction") if isinstance(query, dict) else None)
    if source.instruction is not None and own is None:
        settled["instruction"] = source.instruction
    return settled


def _settled(content: Any, key: str, base: Path, left_out: Collection[str], where: str) -> Any:
    """One content of a record, as `settle` wants it."""
    kept = without_media(content, left_out)
    if kept is None and content is not None:
        raise RecordError(
            where,
            f"{key} holds nothing but {' and '.join(left_out)}, which data.ignore_fields leaves out",
            "To go on without such records set data.on_bad_record: skip",
            "only ignored media",
        )
    return resolve_media(kept, base)


def usable(
    records: Iterable[RawRecord | RecordError],
    use: Callable[[RawRecord], Used],
    on_bad_record: str,
    skipped: Counter[str],
) -> Iterator[Used]:
    """What `use` makes of each record; one that is bad, or that it refuses, is raised or counted in `skipped`.

    Raises:
        RecordError: of the first bad record under `raise`.
    """
    for record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            used = use(record)
        except RecordError as error:
            if on_bad_record == "raise":
                raise
            skipped[error.kind] += 1
            if sum(skipped.values()) <= _WARNINGS:
                logger.warning("skipped %s", error)
            continue
        yield used


class _Builder:
    """Reads a source once into `records.arrow`; returns the summary that is kept beside it."""

    def __init__(
        self,
        source: SourceConfig,
        reader: Format,
        maker: PairMaker | None,
        path: Path,
        media: MediaStore | None,
        base: Path,
        on_bad_record: Literal["raise", "skip"],
        left_out: tuple[str, ...],
    ) -> None:
        self.source, self.reader, self.path, self.media, self.base = source, reader, path, media, base
        self.maker = maker
        self.on_bad_record, self.left_out = on_bad_record, left_out
        self.skipped: Counter[str] = Counter()
        self.fields: set[str] = set()
        self.tasks: set[str] = set()
        self.untrainable: tuple[int, str] = (0, "")
        self.grades = Grades()
        self.census = Census()
        self.checked: set[int] = set()  # hashes of the last references that were found good: pictures are shared
        self.listed: set[int] = set()  # and of the last files that were listed: a table holds many pictures
        self.pictures: TextIO | None = None

    def build(self, folder: Path) -> dict[str, Any]:
        import pyarrow as pa

        kinds = {
            "record": pa.large_string(),
            "where": pa.large_string(),
            "query_key": pa.int64(),
            "positive_key": pa.int64(),
        }
        schema, rows = pa.schema(list(kinds.items())), 0
        with (
            (folder / "records.arrow").open("wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
            (folder / PICTURES).open("w", encoding="utf-8") as self.pictures,
            bar(f"reading {self.path}", None, " records") as shown,
        ):
            found = self._rows()
            while batch := list(islice(found, BATCH)):
                columns = [_column([row[field.name] for row in batch], field.type) for field in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                rows += len(batch)
                shown.update(len(batch))
        if self.maker is not None and rows:
            self.maker.keep(folder)
            self.fields |= self.maker.gives
            for relevance in self.maker.grades:
                self.grades.add(relevance)
        return {
            "rows": rows,
            "skipped": dict(self.skipped),
            "fields": sorted(self.fields),
            "tasks": sorted(self.tasks),
            "untrainable": self.untrainable,
            "grades": self.grades.as_list() if rows else [],
            "census": self.census.as_list(),
        }

    def _rows(self) -> Iterator[dict[str, Any]]:
        return usable(self.reader.read(self.path), self._row, self.on_bad_record, self.skipped)

    def _row(self, record: RawRecord) -> dict[str, Any]:
        where = record["where"]
        settled = settle(record, self.source, self.base, self.left_out)
        if self.maker is None:
            example = parse_record(settled, where)
            positive = max(example.documents, key=lambda document: document.relevance)
            positive_key = _key(positive.id if positive.id is not None else positive.content)
            for document in example.documents:
                self.grades.add(document.relevance)
            if is_untrainable_pair(example):
                self.untrainable = (self.untrainable[0] + 1, self.untrainable[1] or where)
        else:
            example = parse_document(settled, where)
            self.maker.check(example)
            self.maker.count(text_of(example))
            positive_key = _key(example.query)
        self._check_media(example)
        self.census.add(example, self.maker)
        self.tasks.add(example.task.value)
        self.fields.update(fields_of(example))
        return {
            "record": _COMPACT.encode(settled),
            "where": where,
            "query_key": _key(example.query),
            "positive_key": positive_key,
        }

    def _check_media(self, example: Example) -> None:
        for content in (example.query, *(document.content for document in example.documents)):
            for medium in _media(content):
                self._check_medium(medium, example.where)

    def _check_medium(self, medium: Image | Audio, where: str) -> None:
        reference = hash((medium.source, medium.sampling_rate) if isinstance(medium, Audio) else medium.source)
        if self.media is None or reference in self.checked:
            return
        self._list(medium)
        try:
            self.media.check(medium, decode=self.on_bad_record == "skip")
        except MediaError as error:
            remedy = "To go on without such records set data.on_bad_record: skip"
            raise RecordError(where, str(error), remedy, f"{type(medium).__name__.lower()} {error.kind}") from None
        if len(self.checked) >= _CHECKED:
            self.checked.clear()
        self.checked.add(reference)

    def _list(self, image: Image | Audio) -> None:
        """Notes the file of a picture or sound as it is now, before it is checked."""
        if not isinstance(image.source, str) or self.pictures is None:
            return
        name = image.source.rpartition("#")[0] if ".parquet#" in image.source else image.source
        if hash(name) not in self.listed:
            if len(self.listed) >= _CHECKED:
                self.listed.clear()
            self.listed.add(hash(name))
            self.pictures.write(json.dumps([name, *_stamp(name)]) + "\n")


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Of strings, whose type is `large_string`, or of int64. `pa.array` would import pandas to look whether it is one
    of its own (0.2 s)."""
    import pyarrow as pa

    if kind == pa.int64():
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, np.int64))])
    encoded = [value.encode() for value in values]
    starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(starts), pa.py_buffer(b"".join(encoded))])


def _stamp(name: str) -> list[int | None]:
    """Size and time of a file; None where there is none."""
    try:
        found = os.stat(name)
    except (OSError, ValueError):  # gone, or no path at all: a URL
        return [None, None]
    return [found.st_size, found.st_mtime_ns]


def _pictures_unchanged(folder: Path) -> bool:
    """Whether each picture that was checked is still the same file."""
    with (folder / PICTURES).open(encoding="utf-8") as lines:
        return all(_stamp(name) == stamp for name, *stamp in map(json.loads, lines))


def _code(kind: type) -> str:
    """A digest of the code that turns files into rows and counts: of the format's classes and of these modules."""
    modules = {parent.__module__ for parent in kind.__mro__ if issubclass(parent, Format)}
    modules |= {parse_record.__module__, Census.__module__, __name__}
    files = sorted({str(sys.modules[name].__file__) for name in modules})
    return hashlib.sha256(kind.__qualname__.encode() + b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent).resolve()


def _open(folder: Path) -> pa.Table:
    """The memory-mapped table."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(folder / "records.arrow"))).read_all()


def _sample(rows: int, count: int | None) -> np.ndarray | None:
    """`count` rows drawn with a fixed seed, in file order; None when all are taken."""
    if count is None or count >= rows:
        return None
    return np.sort(np.random.default_rng(_SAMPLE_SEED).choice(rows, count, replace=False))


def _fingerprint(
    source: SourceConfig,
    reader: Format,
    maker: PairMaker | None,
    path: Path,
    media: MediaStore | None,
    base: Path,
    on_bad_record: str,
    left_out: tuple[str, ...],
) -> str:
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in reader.files(path)
        if file.is_file()
    ]
    checks = None if media is None else [dataclasses.asdict(media.limits), [str(folder) for folder in media.also]]
    settings = [source.format, source.options, source.instruction, source.task, str(base), checks, on_bad_record]
    settings += [source.pairs, code_of(maker), *left_out]
    text = json.dumps([_code(type(reader)), files, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fields_of(example: Example) -> Iterator[str]:
    """What an example carries, as `RecordDataset.fields` names it."""
    if example.instruction is not None:
        yield "instruction"
    if example.labels:
        told = {(document.id,) for document in example.documents if document.relevance > 0}
        yield "classes" if told.issuperset(example.labels) else "labels"
    for document in example.documents:
        if document.score is not None:
            yield "score"
        if document.rationale is not None:
            yield "rationale"
        if document.relevance == 0 and example.task is not Task.STS:
            yield "negatives"
        if document.relevance not in (0.0, 1.0) and example.task is not Task.STS:  # there it says what a positive is
            yield "relevance"
    for content in (example.query, *(document.content for document in example.documents)):
        for part in content:
            if isinstance(part, Image | Video | Audio):
                yield type(part).__name__.lower()


def _media(content: Content) -> Iterator[Image | Audio]:
    for part in content:
        if isinstance(part, Image | Audio):
            yield part
        elif isinstance(part, Video):
            yield from part.frames


def _key(value: Content | str) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
