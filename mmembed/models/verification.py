"""Whether a saved folder is the model that was trained: it gives its vectors, and not those of before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mmembed.backbones.adapters import adapted
from mmembed.config.blocks import PROMPT_TYPES
from mmembed.errors import CheckpointError
from mmembed.models.checkpoint import load_checkpoint
from mmembed.models.embedding_model import EmbeddingModel, build_from_settings, head_sums
from mmembed.models.folder import PROBES
from mmembed.models.probes import record, vectors_of
from mmembed.preprocess import Preprocessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def verify_checkpoint(
    folder: str | Path,
    model: EmbeddingModel,
    preprocessor: Preprocessor,
    tolerance: float = 1e-3,
    vectors: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Reloads a saved folder and compares vectors of fixed texts (and a picture): equal to the model's; unequal to the
    bare backbone's, or, where only pooling and projection are trained, those unequal to their fresh state. Records the
    vectors in the folder where saving could not.

    Args:
        vectors: the model's, of `vectors_of`, where no process can run it alone.
        dtype: that the model computes them in, if it is not that of its weights (FSDP2 in half precision).

    Returns:
        The largest difference of a vector element to the model in memory.

    Raises:
        CheckpointError: the vectors differ by more than `tolerance`, or training changed nothing.
    """
    ours = vectors_of(model, preprocessor) if vectors is None else vectors
    reloaded, loaded_preprocessor = load_checkpoint(
        folder, device=model.device, media=preprocessor.media, trust_remote_code=model.settings.trust_remote_code
    )
    theirs = vectors_of(reloaded, loaded_preprocessor)
    if any(parameter.requires_grad for parameter in reloaded.backbone.parameters()):
        unchanged = torch.equal(theirs, _untrained_vectors(reloaded, loaded_preprocessor))
    else:
        unchanged = head_sums(reloaded) == model.fresh_head
    dtype = model.dtype if dtype is None else dtype
    if reloaded.dtype != dtype:  # an engine trains in another one than the folder says; rounding is no damage
        theirs = vectors_of(_rounded(reloaded, dtype), loaded_preprocessor)
    difference = (ours - theirs).abs().max().item()
    if difference > tolerance:
        raise CheckpointError(
            f"{folder}: reloaded vectors differ by {difference:.2g} from the model in memory; "
            "do not use this folder, save again"
        )
    if unchanged:
        raise CheckpointError(
            f"{folder}: gives the vectors of the backbone before training; its weights were lost, or never trained "
            "(a learning rate of 0, as in the first step of a warm-up, changes none)"
        )
    if not (Path(folder) / PROBES).exists():
        record(Path(folder), dtype, ours)
    return difference


def _rounded(model: EmbeddingModel, dtype: torch.dtype) -> EmbeddingModel:
    """The model with its parameters in another type, in place; buffers stay, as under DeepSpeed and FSDP2."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _untrained_vectors(model: EmbeddingModel, preprocessor: Preprocessor) -> torch.Tensor:
    """Vectors with the backbone as it was before training, under the trained pooling."""
    if model.settings.adapter_type in PROMPT_TYPES:  # peft's disable_adapter would ask for a generate method
        base = cast("PreTrainedModel", adapted(model.backbone).get_base_model())
        settings = replace(model.settings, adapter=None)
        bare = EmbeddingModel(base, model.family, model.pooling, model.projection, model.normalize, settings)
        return vectors_of(bare, preprocessor)
    if model.settings.adapter_type != "none":
        with adapted(model.backbone).disable_adapter():
            return vectors_of(model, preprocessor)
    fresh, fresh_preprocessor = build_from_settings(model.settings, preprocessor.media)
    fresh.pooling, fresh.projection = model.pooling, model.projection
    return vectors_of(fresh.to(model.device).eval(), fresh_preprocessor)
