"""A corpus larger than memory becomes a folder of vectors: read once, encoded in shards, none twice, by one process or
many.

What is unfinished lies beside its destination, in `NAME.unfinished`, and is moved there when it is complete:

    manifest.json     what the vectors depend on, and how far they are
    entries.jsonl     the entries of the source, in order: each shard's at a known place
    vectors.rows      the vectors, shard by shard in place (`mmembed.shards`), and vectors.done, which are complete

1. The source is read to its end first. So a line that cannot be used is found in the first minutes and not after days,
   the time left is known, and workers find their shard without reading what lies before it.
2. A shard is a function of its entries, the model and the settings: the same batches, so the same numbers, in whichever
   process or life of the run (`encode_shard`). Ray workers read the entries from the folder and send vectors back.
3. Files are put into their final form (`mmembed.inference.encoding` says which), without the entries that were skipped.

A process may be killed at any moment; the same command goes on. Memory: one shard, 40 bytes a shard, and what
`mmembed.inference.sources` says. Disk: the entries twice; of tables, and where media were skipped, the vectors twice.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError, RecordError
from mmembed.files import digest, stamps, write_whole
from mmembed.inference.embedder import Embedder
from mmembed.inference.encoding import (
    ENCODING,
    ITEMS,
    MANIFEST,
    SAME_MODEL,
    TABLES,
    VECTORS,
    Encoding,
    Format,
    encode_entries,
    probe_of,
)
from mmembed.inference.sources import IMAGE_SUFFIXES, Entry, Field, count_entries, read_entries, source_files
from mmembed.locks import only_one
from mmembed.models.files import model_digest
from mmembed.progress import bar
from mmembed.quantize import STORED_DTYPES, stored_width
from mmembed.search.tables import write_table
from mmembed.shards import Shards
from mmembed.staging import put_in_place, sweep
from mmembed.workers import Workers, spread

VERSION = 1  # of what lies in an unfinished folder
HEADER = 128  # bytes of a .npy header
ENTRIES = "entries.jsonl"
_LINE = json.JSONEncoder(ensure_ascii=False)
Load = Callable[[], Embedder]
Report = Callable[[MmembedError], None]


@dataclass(frozen=True)
class Task:
    """What vectors depend on beside the source.

    Attributes:
        encoding: how contents are encoded; `size` and `probe` are found out.
        device, dtype, token_budget: as `Embedder` takes them.
    """

    encoding: Encoding
    device: str | None = None
    dtype: str = "auto"
    token_budget: int | None = None

    def settings(self) -> dict[str, Any]:
        one = self.encoding
        return {
            "model": one.model,
            "weights": model_digest(one.model),
            "role": one.role,
            "instruction": one.instruction,
            "precision": one.precision,
            "truncate_dim": one.truncate_dim,
            "layers": one.layers,
            "format": one.format,
            "media_root": one.media_root,
            "device": None if self.device is None else self.device.partition(":")[0],
            "dtype": self.dtype,
            "token_budget": self.token_budget,
        }


@dataclass
class Progress:
    """The manifest of a folder, unfinished or complete.

    Attributes:
        settings: of `Task`, the source's files with their sizes and times, and the rows of a shard.
        size, probe: dimensions of the model's vectors, and its vector of a fixed text; None before it was loaded.
        count: entries; None until the source has been read.
        skipped: lines that could not be used.
        starts: of each shard in entries.jsonl, in bytes; empty when the folder is complete.
        entries: a digest of each shard's entries.
        shards: of each its entries, which of them were skipped, and a digest of the bytes of the other vectors (blake2b
            of 16 bytes), when all are there.
    """

    settings: dict[str, Any]
    version: int = VERSION
    size: int | None = None
    probe: tuple[float, ...] = ()
    count: int | None = None
    skipped: int = 0
    starts: list[int] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class EncodedShard:
    """What a worker makes of a shard.

    Attributes:
        vectors: (n, W), zeros in rows that were skipped.
        skipped: row -> why.
        size, probe: of the worker's model.
    """

    vectors: NDArray[Any]
    skipped: dict[int, str]
    size: int
    probe: tuple[float, ...]


@dataclass(frozen=True)
class _Job:
    """What a worker has to know; it travels."""

    folder: Path
    task: Task
    rows: int  # of a shard, but of the last
    starts: Sequence[int]
    on_bad: Literal["raise", "skip"]


def encode_corpus(
    output: str | Path,
    source: str | Path,
    task: Task,
    load: Load,
    *,
    shard_rows: int,
    on_bad: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    report: Report,
    workers: Workers | None = None,
) -> Encoding:
    """Encodes a source into a folder; returns the settings with the counts.

    Args:
        load: gives the embedder; called in each worker, with Ray pickled.
        shard_rows: entries encoded together; a kill loses so many at most for each worker.
        workers: None encodes in this process.

    Raises:
        MmembedError: the folder exists (and `overwrite` is off); what is unfinished was begun with another model,
            settings or source (likewise); a bad entry under "raise"; nothing to encode.
        OSError: the disk is full; what is complete is kept.
    """
    output, source = Path(output), Path(source)
    sweep(output)  # a process killed while it moved folders may have left this one aside
    if output.exists() and not (overwrite and (output / ENCODING).is_file()):
        raise MmembedError(f"{output}: exists already; choose another folder, or --overwrite an encoded one")
    settings = {**task.settings(), "source": _source(source, output), "shard_rows": shard_rows}
    work = unfinished(output)
    with only_one(work):
        progress = _begun(work, settings, on_bad, overwrite)
        try:
            if workers is None and progress.shards is None:
                load = partial(_given, load())  # before the source is read, which may take long
            if progress.count is None:
                _read(work, source, _field(task), progress, on_bad, report)
            if progress.shards is None:
                _encode(work, task, load, progress, on_bad, report, workers)
            done = _finish(work, task.encoding, progress)
        except MmembedError:
            if not (work / "vectors.done").exists():  # nothing that would be missed
                shutil.rmtree(work)
            raise
        for file in list(work.iterdir()):
            if file.name not in (VECTORS, TABLES, ITEMS, ENCODING, MANIFEST):
                file.unlink()
        put_in_place(work, output)
    return done


def unfinished(output: Path) -> Path:
    """Where an encoding lies until it is complete."""
    return output.absolute().with_name(f"{output.absolute().name}.unfinished")


def _given(embedder: Embedder) -> Embedder:
    return embedder


# Beginning ------------------------------------------------------------------------------------------------------------


def _field(task: Task) -> Field:
    return "query" if task.encoding.role == "query" else "documents"


def _source(source: Path, output: Path) -> dict[str, Any]:
    files = source_files(source)
    inside = source.is_dir() and output.resolve().is_relative_to(source.resolve())
    if inside and files and files[0].suffix.lower() not in IMAGE_SUFFIXES:
        raise MmembedError(f"{output}: lies in {source}, and its files would be read as data; choose a folder outside")
    return {"path": str(source.absolute()), "files": len(files), "digest": digest(stamps(files))}


def _begun(work: Path, settings: dict[str, Any], on_bad: str, overwrite: bool) -> Progress:
    """How far an earlier process came with the same; a new beginning where there is none."""
    file = work / MANIFEST
    if file.exists():
        try:
            found = Progress(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise MmembedError(f"{file}: not readable ({error}); delete {work} to begin anew") from error
        differs = [key for key, value in settings.items() if found.settings.get(key) != value]
        if found.version != VERSION:
            differs.append("version")
        if not differs and not (found.skipped and on_bad == "raise"):
            return found
        if not overwrite:
            raise MmembedError(_refusal(work, found, settings, differs))
    for left in list(work.iterdir()):
        if left.name not in (".lock", ".owner"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    progress = Progress(settings)
    _note(work, progress)
    return progress


def _refusal(work: Path, found: Progress, settings: dict[str, Any], differs: list[str]) -> str:
    if not differs:
        return f"{work}: was begun without {found.skipped} entries that cannot be used; give --on-bad-record skip again"
    told = {"source": "another source, or its files have changed", "weights": "other weights", "version": "a version"}
    what = "; ".join(
        told.get(key, f"{key.replace('_', ' ')} {found.settings.get(key)}, now {settings.get(key)}") for key in differs
    )
    return (
        f"{work}: was begun with something else ({what}); give the same again to go on, choose another output, or "
        "--overwrite what is unfinished"
    )


def _note(work: Path, progress: Progress) -> None:
    write_whole(work / MANIFEST, json.dumps(asdict(progress), ensure_ascii=False).encode())


# Reading --------------------------------------------------------------------------------------------------------------


def _read(work: Path, source: Path, field: Field, progress: Progress, on_bad: str, report: Report) -> None:
    """Writes entries.jsonl, and notes where shards begin in it."""
    size, count, skipped = progress.settings["shard_rows"], 0, 0
    starts, digests, state, at = list[int](), list[str](), blake2b(digest_size=16), 0
    with (work / ENTRIES).open("wb") as file, bar("read", count_entries(source, field), " entries") as shown:
        for entry in read_entries(source, field):
            shown.update()
            if isinstance(entry, RecordError):
                if on_bad == "raise":
                    raise entry
                skipped += 1
                report(entry)
                continue
            if count % size == 0:
                starts.append(at)
                if count:
                    digests.append(state.hexdigest())
                    state = blake2b(digest_size=16)
            line = _LINE.encode([entry.id, entry.content, entry.where, entry.instruction, entry.named]).encode() + b"\n"
            file.write(line)
            state.update(line)
            at += len(line)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    if not count:
        raise MmembedError(f"{source}: nothing to encode ({skipped} entries skipped)")
    progress.starts, progress.entries = starts, [*digests, state.hexdigest()]
    progress.count, progress.skipped = count, skipped
    _note(work, progress)


def _entries(folder: Path, start: int, count: int) -> Iterator[Entry]:
    """`count` entries from a byte of entries.jsonl on."""
    with (folder / ENTRIES).open("rb") as file:
        file.seek(start)
        for line in itertools.islice(file, count):
            yield Entry(*json.loads(line))


# Encoding -------------------------------------------------------------------------------------------------------------


def _encode(
    work: Path,
    task: Task,
    load: Load,
    progress: Progress,
    on_bad: Literal["raise", "skip"],
    report: Report,
    workers: Workers | None,
) -> None:
    """Computes the shards that are missing, and notes their table when none is."""
    assert progress.count is not None, "the source has been read"
    size = progress.settings["shard_rows"]
    settings = {key: value for key, value in progress.settings.items() if key not in ("source", "format")}
    keys = [digest(settings, entries) for entries in progress.entries]
    shards = Shards(work, "vectors", progress.count, size, keys, HEADER)
    missing = [number for number, _ in shards.missing()]
    job = _Job(work, task, size, progress.starts, on_bad)
    with bar("encode", progress.count, " entries", shards.complete) as shown:
        for number, made in spread(missing, partial(make_encoder, job, load), workers):
            _check(work, progress, made)
            for why in made.skipped.values():
                report(MmembedError(why))
            kept = np.delete(made.vectors, list(made.skipped), axis=0)
            note = {"skipped": list(made.skipped), "digest": blake2b(kept.tobytes(), digest_size=16).hexdigest()}
            shards.write(number, made.vectors, note)
            shown.update(len(made.vectors))
    spans = [shards.span(number) for number in range(len(keys))]
    progress.shards = [{"entries": at.stop - at.start, **shards.note(number)} for number, at in enumerate(spans)]
    _note(work, progress)


def make_encoder(job: _Job, load: Load) -> Callable[[int], EncodedShard]:
    """What a worker does with the number of a shard."""
    embedder = load()
    probe = tuple(round(value, 5) for value in probe_of(embedder, job.task.encoding).tolist())
    return lambda number: encode_shard(job, embedder, probe, number)


def encode_shard(job: _Job, embedder: Embedder, probe: tuple[float, ...], number: int) -> EncodedShard:
    """The vectors of a shard, which depend on its entries, the model and the settings alone."""
    encoding, errors = job.task.encoding, list[MmembedError]()
    entries = list(_entries(job.folder, job.starts[number], job.rows))
    kept, vectors = encode_entries(
        embedder,
        entries,
        job.on_bad,
        errors.append,
        role=encoding.role,
        instruction=encoding.instruction,
        truncate_dim=encoding.truncate_dim,
        precision=encoding.precision,
        token_budget=job.task.token_budget,
        show_progress=False,
    )
    there = set(map(id, kept))
    rows = [row for row, entry in enumerate(entries) if id(entry) in there]
    gone = [row for row, entry in enumerate(entries) if id(entry) not in there]
    if gone:
        whole = np.zeros((len(entries), vectors.shape[1]), vectors.dtype)
        whole[rows] = vectors
        vectors = whole
    skipped = dict(zip(gone, map(str, errors), strict=True))
    return EncodedShard(vectors, skipped, embedder.embedding_size, probe)


def _check(work: Path, progress: Progress, made: EncodedShard) -> None:
    """Raises MmembedError where a worker's model is another than that of the shards before."""
    if progress.size is None:
        progress.size, progress.probe = made.size, made.probe
        _note(work, progress)
        return
    before, now = np.array(progress.probe), np.array(made.probe)
    same = before.shape == now.shape and before @ now >= SAME_MODEL * np.linalg.norm(before) * np.linalg.norm(now)
    if not same:
        raise MmembedError(
            f"{work}: '{progress.settings['model']}' gives other vectors than when this was begun; load the same "
            "weights on every worker, or --overwrite what is unfinished"
        )


# Finishing ------------------------------------------------------------------------------------------------------------


def _finish(work: Path, encoding: Encoding, progress: Progress) -> Encoding:
    """Puts all files into their final form; what an earlier process has done of it is done."""
    assert progress.shards is not None and progress.size is not None and progress.count is not None
    gone = sum(len(shard["skipped"]) for shard in progress.shards)
    done = replace(
        encoding,
        size=encoding.truncate_dim or progress.size,
        count=progress.count - gone,
        skipped=progress.skipped + gone,
        probe=progress.probe,
    )
    if not done.count:
        raise MmembedError(f"{work}: nothing could be encoded ({done.skipped} entries skipped)")
    if not (work / ENCODING).exists():
        rows, shape = work / "vectors.rows", (progress.count, stored_width(done.size, done.precision))
        dtype = np.dtype(STORED_DTYPES[done.precision])
        if done.format == "npy":
            _as_npy(work, rows, progress.shards, shape, dtype)
        else:
            _as_tables(work, rows, progress, done.format, shape[1], dtype)
        _write_items(work, progress)
        write_whole(work / ENCODING, (json.dumps(asdict(done), indent=2, ensure_ascii=False) + "\n").encode())
    progress.starts = []
    _note(work, progress)
    return done


def _as_npy(work: Path, rows: Path, shards: list[dict[str, Any]], shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """The rows with a header in front, in place; copied where some were skipped."""
    if not rows.exists():  # they have become vectors.npy
        return
    count = shape[0] - sum(len(shard["skipped"]) for shard in shards)
    header = npy_header(count, shape[1], dtype)
    if count == shape[0]:
        with rows.open("r+b") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(rows, work / VECTORS)
        return
    with (work / VECTORS).open("wb") as file:
        file.write(header)
        for span, shard in _spans(shards):
            file.write(_kept(rows, span, shard, shape[1], dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _kept(rows: Path, span: slice, shard: dict[str, Any], width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The rows of a shard without those that were skipped. Read, not mapped: what is mapped counts as memory."""
    count = (span.stop - span.start) * width
    stored = np.fromfile(rows, dtype, count, offset=HEADER + span.start * width * dtype.itemsize)
    return np.delete(stored.reshape(-1, width), shard["skipped"], axis=0)


def _spans(shards: list[dict[str, Any]]) -> Iterator[tuple[slice, dict[str, Any]]]:
    start = 0
    for shard in shards:
        yield slice(start, start + shard["entries"]), shard
        start += shard["entries"]


def _as_tables(work: Path, rows: Path, progress: Progress, format: Format, width: int, dtype: np.dtype[Any]) -> None:
    assert progress.shards is not None, "called at the end"
    folder = work / TABLES
    folder.mkdir(exist_ok=True)
    for number, (span, shard) in enumerate(_spans(progress.shards)):
        file = folder / f"{number:06d}.{format}"
        if file.exists() or len(shard["skipped"]) == shard["entries"]:
            continue
        entries = _entries(work, progress.starts[number], shard["entries"])
        gone, staged = set(shard["skipped"]), work / f"table.{format}"
        ids = [entry.id for row, entry in enumerate(entries) if row not in gone]
        write_table(staged, ids, _kept(rows, span, shard, width, dtype))
        with staged.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(staged, file)


def _write_items(work: Path, progress: Progress) -> None:
    assert progress.shards is not None, "called at the end"
    with (work / ITEMS).open("w", encoding="utf-8") as items:
        for start, shard in zip(progress.starts, progress.shards, strict=True):
            gone = set(shard["skipped"])
            for row, entry in enumerate(_entries(work, start, shard["entries"])):
                if row not in gone:
                    items.write(_LINE.encode(entry.item()) + "\n")
        items.flush()
        os.fsync(items.fileno())


def npy_header(count: int, width: int, dtype: np.dtype[Any]) -> bytes:
    """Of `HEADER` bytes; numpy leaves room for more rows."""
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        written, {"shape": (count, width), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    )
    assert len(written.getvalue()) == HEADER, f"numpy writes headers of {len(written.getvalue())} bytes"
    return written.getvalue()
