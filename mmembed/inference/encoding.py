"""An encoded collection on disk: what `mmembed encode` writes and `mmembed search` reads.

    vectors.npy     (N, W) in the chosen precision; memory-mapped by search, readable with numpy.load
    vectors/        instead of it, where the format is arrow or parquet: tables of ids and vectors, one a shard
    items.jsonl     one line a vector, in the same order: {"id", "text", "image"}, "content" where that is not all
    encoding.json   model, role, instruction, precision, dimensions: how to encode a query to match
    manifest.json   what the vectors depend on, and the table of shards with digests

`mmembed.inference.corpus` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmembed.content import Role
from mmembed.errors import MmembedError, RecordError
from mmembed.inference.embedder import Embedder
from mmembed.inference.sources import Entry
from mmembed.quantize import Precision
from mmembed.search import open_vectors
from mmembed.search.tables import StoredTables

VECTORS, TABLES = "vectors.npy", "vectors"
ITEMS, ENCODING, MANIFEST = "items.jsonl", "encoding.json", "manifest.json"
SAME_MODEL = 0.999  # least cosine of the probe's vectors
Format = Literal["npy", "arrow", "parquet"]


@dataclass(frozen=True)
class Encoding:
    """How a collection was encoded.

    Attributes:
        size: dimensions of a vector before packing to bits.
        layers: of the decoder, that were computed; None are all.
        media_root: folder that the images of items.jsonl start from, for a reranker that opens them again.
        probe: the vector of a fixed text, by which a model that has changed since is recognised.
        format: of the vectors.
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
    format: Format = "npy"


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


def open_collection(folder: str | Path) -> tuple[Encoding, np.ndarray | StoredTables]:
    """The settings and the vectors (N, W) of an encoded folder, which stay on the disk."""
    encoding = read_encoding(folder)
    return encoding, open_vectors(Path(folder) / (VECTORS if encoding.format == "npy" else TABLES))


def check_model(embedder: Embedder, encoding: Encoding, folder: str | Path, name: str | None = None) -> None:
    """Raises MmembedError unless the embedder gives the vectors that the collection was encoded with.

    `name` is that of the embedder, where it may be another than the collection's. A fixed text is encoded as the
    collection was, and its cosine to the stored vector judged: the same weights agree to 0.9999 in any dtype and on any
    machine, weights that were trained on do not.
    """
    stored, now = np.array(encoding.probe), probe_of(embedder, encoding)
    if stored.shape != now.shape or stored @ now < SAME_MODEL * np.linalg.norm(stored) * np.linalg.norm(now):
        found = (
            f"another model than '{encoding.model}' is now (retrained, or another --model)"
            if name in (None, encoding.model)
            else f"'{encoding.model}', and '{name}' gives other vectors"
        )
        raise MmembedError(f"{folder}: was encoded by {found}; encode it again with `mmembed encode --overwrite`")


def probe_of(embedder: Embedder, encoding: Encoding) -> np.ndarray:
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
