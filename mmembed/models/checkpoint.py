"""Checkpoints that describe themselves: `mmembed.json` beside safetensors, loaded without any modelling argument.

A folder holds `mmembed.json` (settings), the processor's files, the trained part of the backbone
(`adapter_model.safetensors` with an adapter, the whole model without), and `pooling.safetensors`. Nothing is ever
unpickled. Frozen base weights are not copied: an adapter checkpoint names its base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmembed.backbones import load_backbone, resolve_backbone
from mmembed.backbones.adapters import adapted, quantization_of
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.embedding_model import EmbedderSettings, EmbeddingModel, assemble, build_from_settings
from mmembed.models.folder import (
    ADAPTER,
    FORMAT,
    POOLING,
    SETTINGS,
    check_fit,
    move_into_place,
    read_settings,
    read_tensors,
    settle,
)
from mmembed.models.probes import record, vectors_of
from mmembed.preprocess import Preprocessor
from mmembed.staging import staging
from mmembed.version import __version__

if TYPE_CHECKING:
    from mmembed.media import MediaStore


def save_checkpoint(
    folder: str | Path,
    model: EmbeddingModel,
    preprocessor: Preprocessor,
    training_config_hash: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint; what lies in `folder` survives any failure.

    Args:
        state_dict: the full state where parameters are sharded over processes (ZeRO-3); the model's own otherwise. The
            model is not run then, and `verify_checkpoint` has to record the vectors that `check_recorded` looks for.

    Raises:
        CheckpointError: the disk is full or not writable, a tensor is empty, or the adapter is of a backbone
            whose upper layers were left out: it names a whole one.
    """
    folder = Path(folder)
    if model.is_cut and model.settings.adapter_type != "none":
        raise CheckpointError(
            f"{folder}: an adapter of the first {model.depth} layers would be put on all layers of "
            f"'{model.settings.name_or_path}'; save the embedder that was loaded with all of them, and leave the upper "
            "ones out when it is loaded"
        )
    try:
        with staging(folder) as staged:
            staged.mkdir()
            if state_dict is None:
                record(staged, model.dtype, vectors_of(model, preprocessor))
            _write(staged, model, preprocessor, training_config_hash, state_dict or model.state_dict())
            move_into_place(staged, folder)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk as exceptions of their own
        raise CheckpointError(
            f"{folder}: could not be written ({error}); the previous checkpoint is untouched. "
            "Free disk space or choose another folder"
        ) from error


def load_checkpoint(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    media: MediaStore | None = None,
    trust_remote_code: bool = False,
) -> tuple[EmbeddingModel, Preprocessor]:
    """Loads an embedder in evaluation mode. A folder or name without `mmembed.json` is a bare backbone: mean pooling.

    Args:
        dtype: overrides the saved dtype of the backbone.
        trust_remote_code: run the code that the backbone brings; nothing in the folder can ask for it.

    Raises:
        CheckpointError: files are missing or broken, or the weights belong to another architecture.
    """
    path = Path(resolve_backbone(str(folder)))
    settle(path)
    if not (path / SETTINGS).exists():
        if path.is_dir() and not (path / "config.json").exists():
            raise CheckpointError(
                f"{folder}: neither mmembed.json nor config.json is there; give a saved embedder or a backbone"
            )
        bare = EmbedderSettings(str(folder), adapter=None, trust_remote_code=trust_remote_code)
        model, preprocessor = build_from_settings(bare, media, dtype)
    else:
        model, preprocessor = _load_described(path, str(folder), dtype, media, trust_remote_code)
    return model.to(device).eval() if device is not None else model.eval(), preprocessor


# Writing --------------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    model: EmbeddingModel,
    preprocessor: Preprocessor,
    config_hash: str | None,
    state: Mapping[str, torch.Tensor],
) -> None:
    from safetensors.torch import save_file

    settings = model.settings
    backbone_state = {
        name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")
    }
    if settings.adapter_type == "none":
        _check_filled(folder, backbone_state)
        model.backbone.save_pretrained(str(folder), state_dict=backbone_state)
    else:
        _write_adapter(folder, model, backbone_state)
    head = {
        name: tensor.detach().contiguous().cpu() for name, tensor in state.items() if not name.startswith("backbone.")
    }
    if head:
        _check_filled(folder, head)
        save_file(head, folder / POOLING)
    preprocessor.processor.save_pretrained(folder)
    describe(folder, settings, model.embedding_size, model.family.config, config_hash)


def describe(
    folder: Path, settings: EmbedderSettings, embedding_size: int, config: Any, config_hash: str | None = None
) -> None:
    """Writes `mmembed.json` beside the files of a checkpoint, which it lists: the last thing that is written.

    Args:
        config: of the backbone.
    """
    described = {
        "format": FORMAT,
        "mmembed_version": __version__,
        "settings": {key: value for key, value in asdict(settings).items() if key != "trust_remote_code"},
        "embedding_size": embedding_size,
        "architecture": architecture(config),
        "training_config_hash": config_hash,
        "files": sorted([file.name for file in folder.iterdir() if file.is_file()] + [SETTINGS]),
    }
    (folder / SETTINGS).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def _write_adapter(folder: Path, model: EmbeddingModel, backbone_state: dict[str, torch.Tensor]) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(model.backbone, state_dict=backbone_state).items()
    }
    _check_filled(folder, tensors)
    save_file(tensors, folder / ADAPTER)
    adapted(model.backbone).peft_config["default"].save_pretrained(str(folder))


def _check_filled(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError where weights were not gathered."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise CheckpointError(
            f"{folder}: tensor '{(empty or ['(none at all)'])[0]}' is empty; under ZeRO-3 gather the parameters and "
            "pass state_dict"
        )


def architecture(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }


# Reading --------------------------------------------------------------------------------------------------------------


def _load_described(
    path: Path, shown: str, dtype: str | torch.dtype | None, media: MediaStore | None, trust_remote_code: bool
) -> tuple[EmbeddingModel, Preprocessor]:
    settings, described = read_settings(path)
    settings.trust_remote_code = trust_remote_code
    whole = settings.adapter_type == "none"  # the folder holds the backbone itself
    try:
        backbone = load_backbone(
            str(path) if whole else settings.name_or_path,
            revision=None if whole else settings.revision,
            attention=settings.attention,
            dtype=settings.dtype if dtype is None else dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization=quantization_of(settings.adapter),
            processor_path=str(path),
        )
    except ConfigError as error:
        raise CheckpointError(f"{shown}: its backbone cannot be loaded: {error}") from error
    found = architecture(backbone.config)
    if described.get("architecture") not in (None, found):
        raise CheckpointError(
            f"{shown}: was trained on {described['architecture']}, but '{settings.name_or_path}' is now "
            f"{found}; restore that backbone"
        )
    model, preprocessor = assemble(backbone, settings, media=media)
    if not whole:
        read_adapter(path / ADAPTER, model)
    read_head(path / POOLING, model)
    return model, preprocessor


def read_adapter(file: Path, model: EmbeddingModel) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_tensors(file)
    check_fit(file, get_peft_model_state_dict(model.backbone), tensors)
    set_peft_model_state_dict(model.backbone, tensors)


def read_head(file: Path, model: EmbeddingModel) -> None:
    expected = {
        f"{part}.{name}": tensor
        for part, module in (("pooling", model.pooling), ("projection", model.projection))
        if module is not None
        for name, tensor in module.state_dict().items()
    }
    if model.domain_bias is not None:
        expected["domain_bias"] = model.domain_bias
    if not expected:
        if file.exists():
            raise CheckpointError(
                f"{file}: holds trained tensors, but '{SETTINGS}' beside it names no pooling or projection that has "
                "any; restore that file, or train again"
            )
        return
    tensors = read_tensors(file)
    check_fit(file, expected, tensors)
    model.load_state_dict(tensors, strict=False)  # the backbone is in place already
