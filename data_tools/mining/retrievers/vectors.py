"""Vectors that are there: folders of `mmembed encode`, one of the queries and one of the documents.

A vector is found by the id of its query or document, or by the text where there is no id; where both have a text, it
has to be the same one. Both folders must come from one model: their settings are compared, and with `model` given also
the vector of a fixed text that each folder holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.files import digest, stamps
from data_tools.mining.retrievers import Encoder, Item
from mmembed.content import Role
from mmembed.errors import MmembedError
from mmembed.inference.encoding import ITEMS, TABLES, VECTORS, Encoding, check_model, open_collection
from mmembed.media import MediaStore
from mmembed.quantize import decode
from mmembed.search.tables import StoredTables

_SHARED = ("model", "size", "truncate_dim", "layers")


class Vectors(Encoder):
    """Precomputed vectors.

    Args:
        queries, corpus: folders of `mmembed encode`.
        model: the model that they should come from; None does not look.
    """

    name: ClassVar[str] = "vectors"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image", "video", "audio"})

    def __init__(self, queries: str, corpus: str, model: str | None = None) -> None:
        self.folders: dict[Role, Path] = {"query": Path(queries), "document": Path(corpus)}
        self.model = model
        self._tables: dict[Role, tuple[NDArray[Any] | StoredTables, Encoding, dict[str, tuple[int, str]]]] = {}

    def fingerprint(self) -> Any:
        found: dict[str, Any] = {}
        for role, folder in self.folders.items():
            encoding, vectors = open_collection(folder)
            files = stamps([folder / (VECTORS if encoding.format == "npy" else TABLES)])
            found[role] = [asdict(encoding), vectors.shape, files]
        left, right = found["query"][0], found["document"][0]
        for key in _SHARED:
            if left[key] != right[key]:
                raise MmembedError(
                    f"retriever: {self.folders['query']} was encoded with {key} {left[key]}, "
                    f"{self.folders['document']} with {right[key]}; encode both with one model and one size"
                )
        return [self.name, digest(found)]

    def load(self, media: MediaStore) -> None:
        if self._tables:
            return
        for role, folder in self.folders.items():
            encoding, vectors = open_collection(folder)
            known: dict[str, tuple[int, str]] = {}
            with (folder / ITEMS).open(encoding="utf-8") as lines:
                for row, line in enumerate(lines):
                    item = json.loads(line)
                    text = item.get("text", "")
                    known[f"id:{item['id']}"] = (row, text)
                    known.setdefault(f"text:{text}", (row, text))
            if len(vectors) != encoding.count or encoding.count <= max(row for row, _ in known.values()):
                raise MmembedError(f"{folder}: {len(vectors)} vectors for {encoding.count} items; encode it again")
            self._tables[role] = (vectors, encoding, known)
        if self.model is not None:
            from mmembed.inference.embedder import Embedder

            embedder = Embedder.from_pretrained(self.model, layers=self._tables["document"][1].layers)
            for role, folder in self.folders.items():
                check_model(embedder, self._tables[role][1], folder)

    def probe(self) -> None:
        return None

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        vectors, encoding, known = self._tables[role]
        rows = [self._row(item, known, self.folders[role]) for item in items]
        return np.asarray(decode(vectors[rows], encoding.truncate_dim or encoding.size), np.float32)

    @staticmethod
    def _row(item: Item, known: dict[str, tuple[int, str]], folder: Path) -> int:
        found = known.get(f"id:{item.id}") if item.id is not None else None
        if found is None and item.text:
            found = known.get(f"text:{item.text}")
        if found is None:
            raise MmembedError(f"{item}: no vector in {folder} has this id or text; encode it again from these records")
        row, text = found
        if text and item.text and text != item.text:
            raise MmembedError(
                f"{item}: row {row} of {folder} has this id and another text ({text[:60]!r}, here {item.text[:60]!r}); "
                "encode it again from these records"
            )
        return row
