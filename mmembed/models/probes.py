"""Vectors of fixed inputs, recorded with a checkpoint: what it gave when it was saved, whatever changes around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from mmembed.content import Audio, Image, Text
from mmembed.embeddings import Embeddings
from mmembed.errors import CheckpointError
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.folder import PROBES, read_tensors
from mmembed.preprocess import Item, ModelInputs, Place, Preprocessor

HALF_TOLERANCE = 0.03  # of a unit vector, where weights are in 16 bits: kernels and merged adapters round otherwise
_PROBES = ("a red bus", "What is the capital of France?", "Der Hund schläft. " * 8)


def check_recorded(
    folder: str | Path, model: EmbeddingModel, preprocessor: Preprocessor, tolerance: float = 1e-3
) -> float | None:
    """Compares a loaded checkpoint with the vectors that were recorded when it was saved: the only check that notices
    a changed backbone, file or library.

    Args:
        tolerance: for vectors scaled to unit length; at least 0.03 where weights are in 16 bits.

    Returns:
        The largest distance of such vectors; None where the folder has no record.

    Raises:
        CheckpointError: they are further apart.
    """
    from safetensors import safe_open

    file = Path(folder) / PROBES
    if not file.exists():
        return None
    recorded = read_tensors(file)["vectors"].double()
    with safe_open(file, "pt") as header:
        dtypes = {header.metadata()["dtype"], str(model.dtype)}
    found = _flat(vectors_of(model, preprocessor)).double()
    if found.shape != recorded.shape:
        raise CheckpointError(
            f"{folder}: gives vectors {tuple(found.shape)}, {tuple(recorded.shape)} were recorded when it was saved; "
            "its tokenizer or settings changed, restore them"
        )
    if found.shape[1] > 1:  # one logit has no direction
        found, recorded = F.normalize(found, dim=1), F.normalize(recorded, dim=1)
    distance = (found - recorded).norm(dim=1).max().item()
    if not distance <= (tolerance if dtypes == {"torch.float32"} else max(tolerance, HALF_TOLERANCE)):
        raise CheckpointError(
            f"{folder}: its vectors are {distance:.2g} away from those recorded when it was saved; its weights, its "
            f"backbone '{model.settings.name_or_path}' or a library changed; restore them, or train again"
        )
    return distance


def vectors_of(
    model: EmbeddingModel, preprocessor: Preprocessor, forward: Callable[[ModelInputs], Embeddings] | None = None
) -> torch.Tensor:
    """Vectors of fixed inputs in evaluation mode: texts in both roles, a picture where the backbone sees, and a sound
    where it hears.

    Args:
        forward: runs the model where it is called through a module around it.
    """
    items = [Item((Text(text),), role) for text in _PROBES for role in ("query", "document")]
    if model.family.multimodal:
        picture = PIL.Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        items.append(Item((Image(picture),)))
    if "audio" in model.family.media:
        rate = model.family.sampling_rate
        tone = np.sin(np.arange(rate // 2) * (880 * np.pi / rate)).astype(np.float32)
        items.append(Item((Audio(tone, rate),)))
    if model.settings.head is not None:
        items = [replace(item, role="query", document=items[0].content) for item in items]
    if preprocessor.prompt.reads_lists:
        texts = [item for item in items if isinstance(item.content[0], Text)]
        query, listed = texts[0].content, [item.content for item in items]
        items = [Item(query, "query", document=one, place=Place(0, number)) for number, one in enumerate(listed, 1)]
    was_training = model.training
    inputs = preprocessor(items).to(model.eval().device)
    vectors = _vectors(forward or model, inputs)
    model.train(was_training)
    return vectors


def _flat(vectors: torch.Tensor) -> torch.Tensor:
    """One row an input: the sum over its tokens for multi-vector models."""
    return vectors.sum(1) if vectors.dim() == 3 else vectors  # (B, E)


def record(folder: Path, dtype: torch.dtype, vectors: torch.Tensor) -> None:
    """Writes vectors of `vectors_of` into a folder, and the type they were computed in, for `check_recorded`."""
    from safetensors.torch import save_file

    staged = folder / f".{PROBES}"
    save_file({"vectors": _flat(vectors).contiguous()}, staged, {"dtype": str(dtype)})
    os.replace(staged, folder / PROBES)


@torch.no_grad()
def _vectors(forward: Callable[[ModelInputs], Embeddings], inputs: ModelInputs) -> torch.Tensor:
    embeddings = forward(inputs)
    vectors = embeddings.vectors if embeddings.mask is None else embeddings.vectors * embeddings.mask.unsqueeze(-1)
    return vectors.cpu()
