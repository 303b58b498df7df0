"""Vectors of the training data by another embedder, for an objective whose `guide` it is.

The guide is frozen, so each input is encoded once, before the first step: all queries and documents of a source in the
role and with the instruction that they have in a batch. The vectors (float16, on disk, mapped) lie in the cache under a
fingerprint of the source and of the guide; a batch looks its own up by a hash. Cost: a forward pass of the guide for
each distinct input, 2 bytes a dimension and input on disk, and 4 in memory until they are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmembed.config.blocks import EmbedderConfig
from mmembed.content import Example
from mmembed.data.collate import content_key
from mmembed.data.dataset import RecordDataset
from mmembed.data.streaming import Source
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import build_once, default_cache_dir
from mmembed.objectives import Objective
from mmembed.preprocess import Item
from mmembed.training.data_vectors import Encoder, agreed, check_embedder, encode_all
from mmembed.training.supply import named_parts

KEYS, VECTORS = "keys.npy", "vectors.npy"


class GuideVectors:
    """The vectors of one source's inputs. Data workers open the files for themselves.

    Args:
        folder: that `guide_vectors` has filled. source: its name, for messages.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.folder, self.source = folder, source
        self._open()

    def _open(self) -> None:
        self._keys, self._vectors = (np.load(self.folder / name, mmap_mode="r") for name in (KEYS, VECTORS))

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """(N, G) float32. Raises MmembedError for an input that is none of the source."""
        keys = np.array([input_key(item) for item in items], np.int64)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        if (self._keys[places] != keys).any():
            raise MmembedError(f"guide: an input of source '{self.source}' has no vector in {self.folder}; delete that")
        return torch.from_numpy(self._vectors[places].astype(np.float32))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.source = state["folder"], state["source"]
        self._open()


def input_key(item: Item) -> int:
    """64 bits of a hash of what is encoded. Pictures count by their names."""
    text = f"{content_key(item.content)} {item.role} {item.instruction}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def guide_of(objective: Objective) -> str | None:
    """The embedder that guides it; None: none does. Raises ConfigError where two do."""
    found = {part.guide_model for part in named_parts(objective)} - {None}
    if len(found) > 1:
        raise ConfigError(f"objective: guides {' and '.join(sorted(map(str, found)))}, but a run has one; keep one")
    return next(iter(found), None)


def check_guide(config: EmbedderConfig, objective: Objective) -> None:
    """Raises ConfigError where `guide.model` is no embedder, or a source's inputs are not known beforehand."""
    model = guide_of(objective)
    if model is None:
        return
    for source in config.data.train:
        if source.unforeseen is not None:
            raise ConfigError(
                f"objective.guide.model + data.train '{source.name}' ({source.unforeseen}, and the guide encodes all "
                "inputs before the first step); give the guide a momentum, or remove one of them"
            )
    check_embedder("objective.guide.model", model)


def guide_vectors(sources: Sequence[Source], objective: Objective, encoder: Encoder) -> Mapping[str, GuideVectors]:
    """By name, the vectors of the sources whose objective has a guide. All processes have to call it."""
    return {
        source.name: GuideVectors(_encoded(source, encoder), source.name)
        for source in sources
        if isinstance(source, RecordDataset)
        and any(guide_of(objective.part_for(source.name, task)) is not None for task in source.tasks)
    }


def _encoded(source: RecordDataset, encoder: Encoder) -> Path:
    name = hashlib.sha256(f"{source.fingerprint} {source.source.document_instruction} {encoder.identity}".encode())
    folder = default_cache_dir() / "guide" / name.hexdigest()[:24]
    if agreed(lambda: (folder / "complete.json").exists()):
        return folder
    place: dict[int, tuple[int, int]] = {}  # key -> record and document, -1 for its query
    for row in range(len(source)):
        example = source[row]
        for index in range(-1, len(example.documents)):
            place.setdefault(input_key(_item(source, example, index)), (row, index))
    order = sorted(place)

    def item(number: int) -> tuple[Item, str]:
        row, index = place[order[number]]
        example = source[row]
        return _item(source, example, index), example.where

    vectors = encode_all(encoder, len(order), item, f"{source.name} for the guide")

    def build(work: Path) -> dict[str, int]:
        np.save(work / KEYS, np.array(order, np.int64))
        np.save(work / VECTORS, vectors.astype(np.float16))
        return {"inputs": len(order)}

    agreed(lambda: build_once(folder, build))
    return folder


def _item(source: RecordDataset, example: Example, index: int) -> Item:
    if index < 0:
        return Item.of_query(example)
    return Item.of_document(example.documents[index], source.source.document_instruction, source.source.domain)
