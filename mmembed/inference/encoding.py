"""An encoded collection on disk: what `mmembed encode` writes and `mmembed search` reads.

    vectors.npy     (N, W) in the chosen precision; memory-mapped by search, readable with numpy.load
    items.jsonl     one line a vector, in the same order: {"id", "text", "image"}, "content" where that is not all
    encoding.json   model, role, instruction, precision, dimensions: how to encode a query to match

Contents are encoded and written window after window, so the size of a collection is bounded by the disk, not by memory.
The folder is written beside its destination and moved there when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from mmembed.content import Role
from mmembed.errors import MmembedError, RecordError
from mmembed.inference.embedder import Embedder
from mmembed.inference.sources import Entry
from mmembed.quantize import STORED_DTYPES, Precision, stored_width
from mmembed.search import open_vectors
from mmembed.staging import put_in_place, staging, sweep

VECTORS, ITEMS, ENCODING = "vectors.npy", "items.jsonl", "encoding.json"
SAME_MODEL = 0.999  # least cosine of the probe's vectors
WINDOW = 1024  # entries encoded together: one step of the progress bar


@dataclass(frozen=True)
class Encoding:
    """How a collection was encoded.

    Attributes:
        size: dimensions of a vector before packing to bits.
        layers: of the decoder, that were computed; None are all.
        media_root: folder that the images of items.jsonl start from, for a reranker that opens them again.
        probe: the vector of a fixed text, by which a model that has changed since is recognised.
    """

    model: str
    size: int
    role: Role = "document"
    instruction: str | None = None
    precision: Precision = "float32"
    truncate_dim: int | None = None
    layers: int | None = None
    media_root: str | None = None
    count: int = 0
    skipped: int = 0
    probe: tuple[float, ...] = ()


def read_encoding(folder: str | Path) -> Encoding:
    """Raises MmembedError when the folder was not written by `mmembed encode`."""
    file = Path(folder) / ENCODING
    try:
        return Encoding(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MmembedError(f"{file}: not an encoded collection ({error}); write one with `mmembed encode`") from error


def read_items(folder: str | Path, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
    """row -> item, for the given rows, in one pass over items.jsonl."""
    wanted = set(rows)
    with (Path(folder) / ITEMS).open(encoding="utf-8") as lines:
        return {row: json.loads(line) for row, line in enumerate(lines) if row in wanted}


def has_pictures(folder: str | Path) -> bool:
    """Whether an item of an encoded folder is or has an image."""
    with (Path(folder) / ITEMS).open(encoding="utf-8") as lines:
        return any(not {"image", "images"}.isdisjoint(json.loads(line)) for line in lines)


def open_collection(folder: str | Path) -> tuple[Encoding, np.ndarray]:
    """The settings and the memory-mapped vectors (N, W) of an encoded folder."""
    return read_encoding(folder), open_vectors(Path(folder) / VECTORS)


def check_model(embedder: Embedder, encoding: Encoding, folder: str | Path, name: str | None = None) -> None:
    """Raises MmembedError unless the embedder gives the vectors that the collection was encoded with.

    `name` is that of the embedder, where it may be another than the collection's. A fixed text is encoded as the
    collection was, and its cosine to the stored vector judged: the same weights agree to 0.9999 in any dtype and on any
    machine, weights that were trained on do not.
    """
    stored, now = np.array(encoding.probe), _probe(embedder, encoding)
    if stored.shape != now.shape or stored @ now < SAME_MODEL * np.linalg.norm(stored) * np.linalg.norm(now):
        found = (
            f"another model than '{encoding.model}' is now (retrained, or another --model)"
            if name in (None, encoding.model)
            else f"'{encoding.model}', and '{name}' gives other vectors"
        )
        raise MmembedError(f"{folder}: was encoded by {found}; encode it again with `mmembed encode --overwrite`")


def _probe(embedder: Embedder, encoding: Encoding) -> np.ndarray:
    """(P,) float32: the vector, or the first token's vector, of a fixed text in the role of the collection."""
    vector = embedder.encode(
        ["A red bus, 42 trains, 紅色."],
        role=encoding.role,
        show_progress=False,
        instruction=encoding.instruction,
        truncate_dim=encoding.truncate_dim,
    )[0]
    return np.asarray(vector if vector.ndim == 1 else vector[0])


def usable(
    entries: Iterable[Entry | RecordError], on_bad: Literal["raise", "skip"], report: Callable[[MmembedError], None]
) -> Iterator[Entry]:
    """The entries that can be read. A bad one is raised, or reported and left out."""
    for entry in entries:
        if not isinstance(entry, RecordError):
            yield entry
        elif on_bad == "raise":
            raise entry
        else:
            report(entry)


def encode_entries(
    embedder: Embedder,
    entries: Sequence[Entry],
    on_bad: Literal["raise", "skip"],
    report: Callable[[MmembedError], None],
    **options: Any,
) -> tuple[list[Entry], np.ndarray]:
    """The vectors of entries, by `Embedder.encode(**options)`, and the entries they belong to.

    Raises:
        MmembedError: a medium is missing or broken and `on_bad` is "raise"; under "skip" it is reported and left out.
    """
    default = options.pop("instruction", None)

    def encode(chosen: Sequence[Entry]) -> np.ndarray:
        instructions = [default if entry.instruction is None else entry.instruction for entry in chosen]
        vectors: np.ndarray = embedder.encode([entry.content for entry in chosen], instruction=instructions, **options)
        return vectors

    try:
        return list(entries), encode(entries)
    except MmembedError:
        good = []
        for entry in entries:  # find out which, and name it by its place in the source
            try:
                embedder.check(entry.content, role=options.get("role", "document"))
                good.append(entry)
            except MmembedError as error:
                named = MmembedError(f"{entry.where}: {error}")
                if on_bad == "raise":
                    raise named from error
                report(named)
        if len(good) == len(entries):
            raise
        return good, encode(good)


def write_collection(
    folder: str | Path,
    embedder: Embedder,
    entries: Iterable[Entry | RecordError],
    encoding: Encoding,
    *,
    on_bad: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    report: Callable[[MmembedError], None],
    progress: Callable[[int], None],
    token_budget: int | None = None,
) -> Encoding:
    """Encodes entries into a folder; returns the settings with the counts.

    Raises:
        MmembedError: the folder exists (and `overwrite` is off), a bad entry under "raise", nothing to encode.
    """
    folder = Path(folder)
    sweep(folder)  # a killed run may have left the folder aside
    if folder.exists() and not (overwrite and (folder / ENCODING).is_file()):
        raise MmembedError(f"{folder}: exists already; choose another folder, or --overwrite an encoded one")
    skipped: list[MmembedError] = []

    def skip(error: MmembedError) -> None:
        skipped.append(error)
        report(error)

    with staging(folder) as staged:
        staged.mkdir()
        with (staged / VECTORS).open("wb") as vectors, (staged / ITEMS).open("w", encoding="utf-8") as items:
            width, dtype = stored_width(encoding.size, encoding.precision), np.dtype(STORED_DTYPES[encoding.precision])
            _write_header(vectors, 0, width, dtype)
            count = 0
            for window in _windows(usable(entries, on_bad, skip)):
                kept, rows = encode_entries(
                    embedder,
                    window,
                    on_bad,
                    skip,
                    role=encoding.role,
                    instruction=encoding.instruction,
                    truncate_dim=encoding.truncate_dim,
                    precision=encoding.precision,
                    token_budget=token_budget,
                    show_progress=False,
                )
                vectors.write(np.ascontiguousarray(rows).tobytes())
                items.writelines(json.dumps(entry.item(), ensure_ascii=False) + "\n" for entry in kept)
                count += len(kept)
                progress(len(window))
            if not count:
                raise MmembedError(f"{folder}: nothing to encode ({len(skipped)} entries skipped)")
            vectors.seek(0)
            _write_header(vectors, count, width, dtype)
        probe = tuple(round(value, 5) for value in _probe(embedder, encoding).tolist())
        done = replace(encoding, count=count, skipped=len(skipped), probe=probe)
        (staged / ENCODING).write_text(json.dumps(asdict(done), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        put_in_place(staged, folder)
        return done


def _windows(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    window: list[Entry] = []
    for entry in entries:
        window.append(entry)
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def _write_header(file: IO[bytes], count: int, width: int, dtype: np.dtype[Any]) -> None:
    """A .npy header; numpy pads it so that the number of rows can grow in place."""
    np.lib.format.write_array_header_1_0(
        file, {"shape": (count, width), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    )
