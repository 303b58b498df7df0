"""Vectors of an evaluation, kept on disk by what they are made of: a model, its side and instruction, a content.

Tasks with the same texts have them encoded once, a second run of the same model encodes nothing, and one that was
killed goes on: at most a block of `BLOCK` contents is encoded again. Several processes may use one folder. What is kept
are the float32 vectors as the model gave them, so scores are the same with the cache and without it.

Processes that evaluate the same (`eval.workers`) divide the work here: each encodes what is its share by the contents'
keys, and waits for what the others put into the folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.mteb_adapter import Encodes
from mmembed.content import Role
from mmembed.data.collate import content_digest
from mmembed.feature_store import FeatureStore

BLOCK = 2048  # contents that are encoded between two writes
PATIENCE = 300.0  # seconds without a vector of the others, after which theirs are encoded here
POLL = 0.1
NOTES = "encoded.txt"


class Caching:
    """Encodes what is not kept yet.

    Args:
        embedder: makes the vectors.
        folder: of all models; each has a store of its own there.
        limit: bytes of all vectors in the folder; a full one takes no more.
        made_by: everything that vectors depend on but content, side and instruction.
        share: which part of the work this process does, and how many parts there are.
        alone: whether the processes with the other parts have all ended.

    Raises:
        CacheError: the folder cannot be made or read.
    """

    def __init__(
        self,
        embedder: Encodes,
        folder: Path,
        limit: int,
        made_by: Mapping[str, Any],
        share: tuple[int, int] = (0, 1),
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        about = hashlib.blake2b(json.dumps(made_by, sort_keys=True).encode(), digest_size=16)
        self.embedder, self.store = embedder, FeatureStore(folder / about.hexdigest(), limit)
        self.share, self.alone = share, alone
        self.read = self.computed = 0

    def similarity(self, a: Any, b: Any) -> Any:
        return self.embedder.similarity(a, b)

    def encode(self, contents: Sequence[Any], *, role: Role, instruction: str | None) -> Any:
        """(N, E) float32, or a list of (T, E) of a multi-vector model, as the embedder gives."""
        keys = [_key(content, role, instruction) for content in contents]
        vectors: dict[bytes, np.ndarray] = {}
        missing: dict[bytes, Any] = {}
        for key, content in zip(keys, contents, strict=True):
            if key in vectors or key in missing:
                continue
            kept = self.store.get(key)
            if kept is None:
                missing[key] = content
            else:
                vectors[key] = kept["vector"].numpy()
        self.read += len(vectors)
        part, parts = self.share
        self._compute({key: one for key, one in missing.items() if key[0] % parts == part}, vectors, role, instruction)
        left = {key: one for key, one in missing.items() if key not in vectors}
        self._await(left, vectors)
        self._compute({key: one for key, one in left.items() if key not in vectors}, vectors, role, instruction)
        found = [vectors[key] for key in keys]
        return found if found[0].ndim == 2 else np.stack(found)

    def encoded(self) -> set[str]:
        """Digests that `note` was given, of this model by any process: their vectors are all here."""
        path = self.store.folder / NOTES
        return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()

    def note(self, parts: Iterable[str]) -> None:
        """Writes down digests of what is encoded now, unless the folder is full and may lack some of it."""
        if self.store.bytes_used < self.store.limit:
            with (self.store.folder / NOTES).open("a", encoding="utf-8") as file:
                file.write("".join(f"{part}\n" for part in set(parts) - self.encoded()))

    def _compute(
        self, wanted: Mapping[bytes, Any], vectors: dict[bytes, np.ndarray], role: Role, instruction: str | None
    ) -> None:
        """Encodes contents, a block at a time, into `vectors` and the store."""
        keys = list(wanted)
        for start in range(0, len(keys), BLOCK):
            block = keys[start : start + BLOCK]
            encoded = self.embedder.encode([wanted[key] for key in block], role=role, instruction=instruction)
            for key, vector in zip(block, encoded, strict=True):
                vectors[key] = np.asarray(vector, dtype=np.float32)
                if np.isfinite(vectors[key]).all():
                    self.store.put(key, {"vector": torch.from_numpy(vectors[key])})
        self.computed += len(keys)

    def _await(self, wanted: Mapping[bytes, Any], vectors: dict[bytes, np.ndarray]) -> None:
        """Takes what other processes put into the store, until all is there, they have ended, or nothing comes."""
        waiting, since = set(wanted), time.monotonic()
        while waiting:
            ended = self.alone()
            self.store.refresh()
            for key in [key for key in waiting if key in self.store]:
                kept = self.store.get(key)
                if kept is not None:
                    vectors[key], since = kept["vector"].numpy(), time.monotonic()
                    self.read += 1
                waiting.remove(key)
            if ended or time.monotonic() - since > PATIENCE:
                return
            if waiting:
                time.sleep(POLL)


def _key(content: Any, role: Role, instruction: str | None) -> bytes:
    told = json.dumps([role, instruction]).encode()
    return hashlib.blake2b(told + content_digest(content, 16), digest_size=16).digest()
