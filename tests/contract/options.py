"""The blocks that the contract tests build objectives from, where a name alone is not enough."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("0", "1", "2", "3")  # the classes of the labels that tests give
_KEPT = tempfile.TemporaryDirectory(prefix="label-vectors-")  # until the tests end


def block(name: str) -> dict[str, Any]:
    """Small enough that one batch of 8 pairs fills what it remembers."""
    needed: dict[str, dict[str, Any]] = {
        "hydra": {"classes": list(CLASSES), "label_size": 6, "gate_size": 6},
        "mlcd": {"clusters": 8, "sampled": 0.75, "temperature": 0.5},
        "mochi": {"size": 8, "hardest": 4, "mixtures": 3, "query_mixtures": 2},
        "proto_clip": {"prototypes": 3, "episode": 8, "head_size": 4, "teacher_temperature": 0.5},
        "soft_labels": {"vectors": label_vectors()} if name == "soft_labels" else {},
    }
    return {"type": name, **needed.get(name, {})}


@cache
def label_vectors() -> str:
    """A folder as `mmembed encode` writes it."""
    folder = Path(_KEPT.name)
    write_vectors(folder, CLASSES, np.random.default_rng(0).normal(size=(len(CLASSES), 5)).astype("float32"))
    return str(folder)


def write_vectors(folder: Path, names: tuple[str, ...], vectors: np.ndarray) -> None:
    np.save(folder / "vectors.npy", vectors)
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in names))
