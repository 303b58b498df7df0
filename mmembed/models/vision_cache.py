"""Frozen vision towers run once an image: their features are kept on disk and read in later epochs and runs.

What is kept are the features that enter the language model, behind the projector (Qwen3-VL's deepstack features among
them), so nothing of the vision side may be trained or draw random numbers. A feature is named by the bytes of its
picture, and its folder by everything else that it depends on: weights of vision tower and projector, their dtype and
configuration, the processor's settings and version, autocast, and the attention kernel that was asked for: `eager` and
`sdpa` give features that differ by 8e-7 in float32, but by .9 % in bfloat16 (nano, relative norm). Only the device and
its libraries are left out, whose differences are of the order of rounding. Another picture under the same path, another
`max_pixels`, other weights are misses, never stale hits. A hit also saves decoding and resizing the picture.

Cost at start: hashing the weights, about a second a gigabyte. On disk an image takes visual tokens x hidden size x
bytes of the dtype, times 1 + the number of deepstack layers: 128 KB with the nano at 64 tokens in float32, 8 MB with
Qwen3-VL-2B at 500 tokens in bfloat16.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmembed.feature_store import FeatureStore
from mmembed.media import default_cache_dir
from mmembed.models.randomness import draws, dropping, looks_at_the_batch

if TYPE_CHECKING:
    from mmembed.models.embedding_model import EmbeddingModel
    from mmembed.preprocess import Preprocessor

TOUCHED = "under ZeRO-3 and FSDP2 every process runs the vision tower in every chunk"  # a reason as `uncached` gives


def uncached(model: EmbeddingModel, training: bool) -> str | None:
    """Why image features cannot be kept; None where they can.

    Args:
        training: whether weights will change.
    """
    family = model.family
    if family.unstored is not None:
        return family.unstored
    if "mm_encoder_outputs" not in inspect.signature(type(model.base).forward).parameters:
        return "this version of transformers takes no image features; update it"
    if not training:
        return None
    towers = model.parameter_towers()
    parts = sorted({towers[name] for name, one in model.named_parameters() if one.requires_grad})
    trained = [part for part in parts if part in ("vision", "projector")]
    if trained:
        frozen = sorted({*model.settings.freeze, *trained})
        what = "vision tower and projector are" if len(trained) == 2 else f"{trained[0]} is"
        return f"the {what} trained, so features change; set model.freeze: [{', '.join(frozen)}]"
    return _unsteady(model)


def open_features(
    model: EmbeddingModel, preprocessor: Preprocessor, where: str | Path, limit: int, precision: str
) -> FeatureStore:
    """The store of this model and processor.

    Args:
        where: the folder that holds stores, one a model; "auto" is `vision` in mmembed's cache folder.
        limit: bytes of all stores there.
        precision: of autocast, or tf32; "" where there is none.

    Raises:
        CacheError: the folder cannot be used.
    """
    parent = default_cache_dir() / "vision" if where == "auto" else Path(where)
    return FeatureStore(parent / fingerprint(model, preprocessor, precision), limit)


def fingerprint(model: EmbeddingModel, preprocessor: Preprocessor, precision: str) -> str:
    """A digest of all that a feature depends on beside its picture."""
    import transformers

    digest = hashlib.blake2b(digest_size=12)
    settings = {
        "format": 2,
        "family": type(model.family).__name__,
        "processor": preprocessor.processor.image_processor.to_dict(),
        "vision": model.family.config.vision_config.to_dict(),
        "transformers": transformers.__version__,
        "precision": precision,
        "dtype": str(model.dtype),
        "attention": model.settings.attn_implementation,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    patterns = _vision_patterns(model)
    for name, tensor in model.base.state_dict().items():
        if any(re.search(pattern, name) for pattern in patterns):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _vision_patterns(model: EmbeddingModel) -> list[str]:
    return [pattern for tower, pattern in model.family.towers().items() if tower in ("vision", "projector")]


def _unsteady(model: EmbeddingModel) -> str | None:
    """What of the vision side computes something else in training mode; None where nothing does."""
    modules = _vision_modules(model)
    reason = draws(modules) or looks_at_the_batch(modules)
    rates = dropping(model.family.config.vision_config.to_dict())
    if reason is None and rates:  # of modules that read the configuration when they run
        name, rate = next(iter(rates.items()))
        reason = f"vision_config.{name} is {rate:g}: values are dropped at random in training"
    return reason


def _vision_modules(model: EmbeddingModel) -> list[tuple[str, nn.Module]]:
    patterns = _vision_patterns(model)
    return [
        (name, module)
        for name, module in model.base.named_modules()
        if any(re.search(pattern, f"{name}.") for pattern in patterns)
    ]
