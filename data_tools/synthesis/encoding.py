"""What a model says of contents, or of pairs of them, computed once: in shards below the stage's folder.

    encoded("texts", contents, encoder, "document", context)  (N, E), mapped: a row of each content
    rows = Rows(items, "query", media, encoder.reads)         which content stands where; equal contents are one row
    vectors = rows.vectors(encoder, context)                  (N, E), mapped
    scores = scores_of_pairs(teacher, rows, others, context)  (P, 1), mapped

A killed run goes on behind its last whole shard. The pipeline empties the folder where settings, files of the model or
items are others. Cost: each item is read once for its rows and once more for each array that is still to compute; 170
bytes of memory a distinct content and 8 bytes a document; vectors stay on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_tools.files import digest
from data_tools.synthesis.sides import Side
from data_tools.synthesis.stages import Context, Item, Items
from data_tools.synthesis.templates import pictures_of
from mmembed.config.blocks import TypedBlock
from mmembed.content import Image, Role, Text, to_content
from mmembed.data.records import resolve_media
from mmembed.errors import ConfigError, MmembedError, RecordError
from mmembed.inference.sources import media_root, read_entries
from mmembed.media import MediaStore
from mmembed.progress import bar
from mmembed.shards import Shards

if TYPE_CHECKING:  # they import torch, which a run without models does not need
    from data_tools.mining.retrievers import Encoder
    from data_tools.mining.retrievers import Item as Entry
    from data_tools.mining.teachers import PairTeacher

SHARD = 1024  # contents, or pairs, that a kill may lose
Rows64 = NDArray[np.int64]
T = TypeVar("T")


def encoder_of(block: TypedBlock | None, stage: str) -> Encoder:
    """What gives vectors, as a block of mining's `retriever` names it; loads nothing.

    Raises:
        ConfigError: none is named, there is no such one, or it gives no vectors.
    """
    from data_tools.mining.retrievers import RETRIEVERS, Encoder  # imports torch

    if block is None:
        raise ConfigError(f"{stage}.embedder: is missing; name one: {{type: mmembed, model: runs/embedder}}")
    found = RETRIEVERS.build(block)
    if not isinstance(found, Encoder):
        raise ConfigError(
            f"{stage}.embedder: '{found.name}' gives no vectors; name an embedder, {{type: mmembed, ...}}"
        )
    return found


def encoded(
    name: str,
    contents: Callable[[], Iterator[Entry]],
    encoder: Encoder,
    role: Role,
    context: Context,
    load: Callable[[], None] | None = None,
    written: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """(N, E), mapped: a row of each content; equal ones are computed as often as they come.

    Args:
        contents: begins to give all of them, anew at each call.
        load, written: as of `in_shards`; None loads the encoder.

    Raises:
        MmembedError: NaN or infinity, or a content that the encoder cannot read.
    """
    digests = b"".join(seen(one, context.media, encoder.reads) for one in contents())
    return in_shards(
        context,
        name,
        np.frombuffer(digests, "V16"),
        contents(),
        lambda part: encoder.encode(part, role),
        load or (lambda: encoder.load(context.media)),
        written,
    )


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """(n, E) of length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


class Rows:
    """The distinct contents of one side of items, numbered as they come.

    Attributes:
        of_item: (n,) the first of an item's rows in `rows`, and behind the last item their number.
        rows: (P,) of all contents, item by item.
        digests: (N,) of 16 bytes: of what a model sees.
    """

    def __init__(self, items: Items, side: Side, media: MediaStore, reads: Collection[str]) -> None:
        self.items, self.side = items, side
        known: dict[bytes, int] = {}
        starts, rows = [0], list[int]()
        for item in items:
            for entry in entries(item, side):
                rows.append(known.setdefault(seen(entry, media, reads), len(known)))
            starts.append(len(rows))
        self.of_item, self.rows = np.array(starts, np.int64), np.array(rows, np.int64)
        self.digests = np.frombuffer(b"".join(known), "V16")

    def __len__(self) -> int:
        """N, the distinct contents."""
        return len(self.digests)

    def __getitem__(self, place: int) -> Rows64:
        """The rows of an item."""
        return self.rows[self.of_item[place] : self.of_item[place + 1]]

    def contents(self) -> Iterator[Entry]:
        """The distinct contents, in the order of the rows."""
        following, places = 0, iter(self.rows.tolist())
        for entry in chain.from_iterable(entries(item, self.side) for item in self.items):
            if next(places) == following:
                following += 1
                yield entry

    def vectors(self, encoder: Encoder, context: Context) -> NDArray[np.float32]:
        """(N, E), mapped. Raises MmembedError: NaN or infinity, or a content that the encoder cannot read."""
        role: Role = "query" if self.side == "query" else "document"
        return in_shards(
            context,
            f"{self.side}-vectors",
            self.digests,
            self.contents(),
            lambda part: encoder.encode(part, role),
            lambda: encoder.load(context.media),
        )


def entries(item: Item, side: Side) -> Iterator[Entry]:
    """The contents of one side of an item, as models of mining take them."""
    from data_tools.mining.retrievers import Item as Entry

    where = f"'{item['id']}'"
    if side == "query":
        yield Entry(item["query"], item.get("instruction"), item["id"], where)
    elif "content" in item:
        yield Entry(item["content"], None, item["id"], where)
    else:
        for document in item["documents"]:
            yield Entry(document["content"], None, document.get("id"), where)


def scores_of_pairs(teacher: PairTeacher, queries: Rows, documents: Rows, context: Context) -> NDArray[np.float32]:
    """(P, 1), mapped: what a teacher says of each record's query with each of its documents, record by record."""
    counts = np.diff(documents.of_item)
    left = queries.digests[np.repeat(queries.rows, counts)].view(np.uint8).reshape(-1, 16)
    right = documents.digests[documents.rows].view(np.uint8).reshape(-1, 16)
    pairs = np.ascontiguousarray(np.concatenate([left, right], axis=1)).view("V32").reshape(-1)
    return in_shards(
        context,
        "pair-scores",
        pairs,
        (
            (query, one)
            for item in queries.items
            for query in entries(item, "query")
            for one in entries(item, "document")
        ),
        lambda part: teacher.score(*zip(*part, strict=True))[:, None],
        lambda: teacher.load(context.media),
    )


def vectors_of_files(
    paths: Sequence[Path], known: Rows, encoder: Encoder, context: Context
) -> NDArray[np.float32] | None:
    """(M, E), mapped: of the distinct documents of files of lines of content that are not among the known ones; None
    where there are none.

    Raises:
        MmembedError: a line that cannot be read.
    """
    media = MediaStore(None, context.media.limits, also=[media_root(path) for path in paths])
    there = set(known.digests.tolist())
    digests, places = dict[bytes, None](), set[int]()
    for place, entry in enumerate(_lines(paths)):
        key = seen(entry, media, encoder.reads)
        if key not in there and key not in digests:
            digests[key] = None
            places.add(place)
    if not digests:
        return None
    entries_left = (entry for place, entry in enumerate(_lines(paths)) if place in places)
    return in_shards(
        context,
        "corpus-vectors",
        np.frombuffer(b"".join(digests), "V16"),
        entries_left,
        lambda part: encoder.encode(part, "document"),
        lambda: encoder.load(media),
    )


def _lines(paths: Sequence[Path]) -> Iterator[Entry]:
    from data_tools.mining.retrievers import Item as Entry

    for path in paths:
        for line in read_entries(path):
            if isinstance(line, RecordError):
                raise line
            yield Entry(resolve_media(line.content, media_root(path)), None, line.id, line.where)


def in_shards(
    context: Context,
    name: str,
    digests: NDArray[Any],
    values: Iterator[T],
    compute: Callable[[Sequence[T]], NDArray[np.float32]],
    load: Callable[[], None],
    written: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """(N, W), mapped: a row of each value; (0, 0) of none.

    Args:
        digests: (N,) of the values.
        values: in order; read as far as something is missing.
        load: readies what computes, where something is missing.
        written: called behind each shard.

    Raises:
        MmembedError: NaN or infinity; names the value.
    """
    if not len(digests):
        return np.empty((0, 0), np.float32)
    keys = [digest(digests[start : start + SHARD]) for start in range(0, len(digests), SHARD)]
    context.folder.mkdir(exist_ok=True)
    shards = Shards(context.folder, name, len(digests), SHARD, keys)
    missing = dict(shards.missing())
    if missing:
        load()
        with bar(name, len(digests), " rows", shards.complete, delay=1.0) as shown:
            for number in range(len(keys)):
                part = list(islice(values, SHARD))
                if number in missing:
                    made = compute(part)
                    _check_finite(made, part)
                    shards.write(number, made)
                    if written is not None:
                        written()
                    shown.update(len(part))
    return shards.open()


def seen(entry: Entry, media: MediaStore, reads: Collection[str]) -> bytes:
    """Digest of what a model sees. Raises ConfigError where it does not read a content of this kind."""
    content = to_content(entry.content)
    for kind in {type(part).__name__.lower() for part in content} - set(reads):
        raise ConfigError(
            f"{entry} has {kind}, and the model reads {', '.join(sorted(reads))}; name one that reads it, or leave "
            "such items out"
        )
    pictures = b"".join(media.digest(Image(source)) for source in pictures_of(entry.content))
    parts = [part.text if isinstance(part, Text) else [type(part).__name__] for part in content]
    return bytes.fromhex(digest(parts, entry.instruction, pictures))


def _check_finite(made: NDArray[np.float32], part: Sequence[Any]) -> None:
    finite = np.isfinite(made).all(axis=1)
    if not finite.all():
        raise MmembedError(
            f"{part[int(np.flatnonzero(~finite)[0])]}: the model gives NaN or infinity for it; load it in float32, or "
            "leave it out"
        )
