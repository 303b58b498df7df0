"""The models that are looked at, each with its vectors of the same documents, row by row.

The vectors of an encoded folder are those of the model that encoded it; they stay on the disk. Every other model
encodes the documents first, and its vectors are kept in memory, N x E numbers of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.inference.embedder import Embedder
from mmembed.inference.encoding import check_model, encode_entries, open_collection, read_items, usable
from mmembed.inference.sources import Entry, entry_of_item, read_entries
from mmembed.search.tables import StoredTables

Load = Callable[[str, int | None], Embedder]  # name, decoder layers
Report = Callable[[MmembedError], None]


@dataclass(frozen=True)
class Side:
    """A model, and the vectors (N, W) that it gave the documents.

    Attributes:
        size: dimensions of a vector before packing to bits.
        truncate_dim: dimensions that are kept of a query's vector, to match; None keeps all.
    """

    name: str
    embedder: Embedder
    vectors: NDArray[Any] | StoredTables
    size: int
    truncate_dim: int | None = None


@dataclass(frozen=True)
class Documents:
    """What is searched, by one model or two.

    Attributes:
        items: row -> what `Entry.item` gives, for the rows asked for.
    """

    sides: tuple[Side, ...]
    items: Callable[[Iterable[int]], dict[int, dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.sides[0].vectors)


def open_folder(folder: Path, models: Sequence[str], load: Load, report: Report) -> Documents:
    """The documents of a folder that `mmembed encode` wrote.

    Args:
        models: that are looked at; none is the one that encoded the folder, which has to be among them.

    Raises:
        MmembedError: none of the models encoded the folder, or a document cannot be encoded by the other one.
    """
    encoding, stored = open_collection(folder)
    models = models or [encoding.model]
    names = dict(zip(models, short_names(models), strict=True))
    own = encoding.model if encoding.model in models else models[0]
    embedder = load(own, encoding.layers)
    check_model(embedder, encoding, folder, own)
    sides = {own: Side(names[own], embedder, stored, encoding.size, encoding.truncate_dim)}
    others = [model for model in models if model != own]
    if others:
        items = read_items(folder, range(len(stored)))
        entries = [entry_of_item(items[row]) for row in range(len(stored))]
        how = {"role": encoding.role, "instruction": encoding.instruction}
        sides |= {model: _side(names[model], load(model, None), entries, report, **how) for model in others}
    return Documents(tuple(sides[model] for model in models), lambda rows: read_items(folder, rows))


def open_source(
    source: Path, models: Sequence[str], load: Load, report: Report, on_bad: Literal["raise", "skip"]
) -> Documents:
    """The documents of a folder of images or a JSON Lines file, which every model encodes.

    Args:
        on_bad: what is done with an entry that the first model cannot encode; the second has to encode the others.

    Raises:
        MmembedError: an entry cannot be encoded, or none is left.
    """
    entries = list(usable(read_entries(source), on_bad, report))
    first, *others = short_names(models)
    embedder = load(models[0], None)
    kept, vectors = encode_entries(embedder, entries, on_bad, report)
    if not kept:
        raise MmembedError(f"{source}: holds no usable entry; correct the lines")
    sides = [Side(first, embedder, vectors, embedder.embedding_size)]
    sides += [_side(name, load(model, None), kept, report) for name, model in zip(others, models[1:], strict=True)]
    items = [entry.item() for entry in kept]
    return Documents(tuple(sides), lambda rows: {row: items[row] for row in rows})


def _side(name: str, embedder: Embedder, entries: Sequence[Entry], report: Report, **options: Any) -> Side:
    """A model that encodes all entries now."""
    _, vectors = encode_entries(embedder, entries, "raise", report, **options)
    return Side(name, embedder, vectors, embedder.embedding_size)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart.

    >>> short_names(["runs/a/embedder", "runs/b/embedder"])
    ['a/embedder', 'b/embedder']
    """
    longest = max(len(Path(path).parts) for path in paths)
    for count in range(1, longest):
        names = ["/".join(Path(path).parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)
