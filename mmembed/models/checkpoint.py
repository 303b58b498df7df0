"""Checkpoints that describe themselves: `mmembed.json` beside safetensors, loaded without any modelling argument.

A folder holds `mmembed.json` (settings), the processor's files, the trained part of the backbone
(`adapter_model.safetensors` with an adapter, the whole model without), and `pooling.safetensors`. Nothing is ever
unpickled. Everything is written beside the destination first and moved in as one folder when all of it is on disk: a
full disk leaves the previous checkpoint as it was, and after a kill either the previous or the new one loads (loading
finishes an interrupted move). Frozen base weights are not copied: an adapter checkpoint names its base.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import PIL.Image
import torch
from torch.nn import functional as F

from mmembed.backbones import load_backbone, resolve_backbone
from mmembed.backbones.adapters import PROMPT_TYPES, adapted, quantization_of
from mmembed.content import Image, Text
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.embedding_model import (
    EmbedderSettings,
    EmbeddingModel,
    assemble,
    build_embedding_model,
    build_from_settings,
    head_sums,
    settings_of,
)
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Item, Preprocessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmembed.config import EmbedderConfig
    from mmembed.media import MediaStore

SETTINGS, ADAPTER, POOLING = "mmembed.json", "adapter_model.safetensors", "pooling.safetensors"
PROBES = "probes.safetensors"  # vectors of fixed inputs, as the model in memory gave them when it was saved
HALF_TOLERANCE = 0.03  # of a unit vector, where weights are in 16 bits: kernels and merged adapters round otherwise
INCOMING = ".mmembed-incoming"  # a complete checkpoint inside the folder that it replaces
FORMAT = 1


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
        CheckpointError: the disk is full or not writable, or an adapter tensor is empty.
    """
    folder = Path(folder)
    staging = folder.with_name(f".{folder.name}.saving-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if state_dict is None:
            _record(staging, model, _vectors_of(model, preprocessor))
        _write(staging, model, preprocessor, training_config_hash, state_dict or model.state_dict())
        _move_into_place(staging, folder)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk as exceptions of their own
        raise CheckpointError(
            f"{folder}: could not be written ({error}); the previous checkpoint is untouched. "
            "Free disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    _settle(path)
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


def build_for_training(cfg: EmbedderConfig, media: MediaStore | None = None) -> tuple[EmbeddingModel, Preprocessor]:
    """Builds model and preprocessor of a config. Where `model.name_or_path` is a saved embedder, training goes on from
    its weights (a second stage, as NV-Embed has one), under the settings of `inherit_settings`.

    Raises:
        ConfigError: an unknown name or option, another architecture than the saved one, or nothing to train.
        CheckpointError: the saved weights do not fit.
    """
    cfg = inherit_settings(cfg)
    folder, settings = Path(resolve_backbone(cfg.model.name_or_path)), settings_of(cfg)
    if not (folder / SETTINGS).exists():
        model, preprocessor = build_embedding_model(cfg, media)
    else:
        saved, _ = read_settings(folder)
        whole = saved.adapter_type == "none"  # the folder holds the backbone itself
        base = settings.name_or_path if whole else saved.name_or_path
        model, preprocessor = build_from_settings(replace(settings, name_or_path=base, revision=saved.revision), media)
        if whole:
            _read_head(folder / POOLING, model)
        else:
            restore_weights(folder, model)
    check_trainable(model)
    return model, preprocessor


def inherit_settings(cfg: EmbedderConfig) -> EmbedderConfig:
    """The config of a run that starts from a saved embedder: what it leaves unset comes from that `mmembed.json`.

    Prompt, lengths, dtype, dropout, and of a fully trained model the frozen towers and a new adapter, may be set anew;
    the architecture (attention, pooling, projection, normalisation, the saved adapter) may not. The config of a bare
    backbone comes back as it is.

    Raises:
        ConfigError: the config sets a part of the architecture to another value than the saved one.
    """
    folder = Path(resolve_backbone(cfg.model.name_or_path))
    _settle(folder)
    if not (folder / SETTINGS).exists():
        return cfg
    from mmembed.config import AdapterConfig, build_config

    saved, _ = read_settings(folder)
    given, name = cfg.adapter.model_fields_set, cfg.model.name_or_path
    renewed = saved.adapter_type == "none" and bool(given) and cfg.adapter.type != "none"
    if "type" in given and not renewed and cfg.adapter.type != saved.adapter_type:
        raise ConfigError(
            f"adapter.type '{cfg.adapter.type}': '{name}' was saved with '{saved.adapter_type}'; go on with that "
            "adapter, or merge it into its backbone first"
        )
    tree = cfg.model_dump(mode="json", exclude_unset=True)
    of_model = ("revision", "attention", "dtype", "attn_implementation", "freeze")
    tree["model"] = {key: vars(saved)[key] for key in of_model} | tree.get("model", {})
    tree["lengths"] = saved.lengths | tree.get("lengths", {})
    tree = {key: vars(saved)[key] for key in ("pooling", "normalize", "projection", "prompt")} | tree
    if not renewed:
        usual = AdapterConfig().model_dump(mode="json")
        held = saved.adapter or {"type": "none"}
        unusual = {key: value for key, value in held.items() if key == "type" or value != usual[key]}
        tree["adapter"] = unusual | tree.get("adapter", {})
    merged = build_config(tree, where=name)
    for key, value, wanted in _differences(saved, settings_of(merged), adapter=not renewed):
        raise ConfigError(
            f"{key}: {wanted!r}, but '{name}' was saved with {value!r}; remove the key to go on from its weights, or "
            "start from its backbone"
        )
    return merged


def check_trainable(model: EmbeddingModel, pictures: bool = True) -> None:
    """Refuses to train nothing.

    Args:
        pictures: whether the training data has any.

    Raises:
        ConfigError: no parameter is trained, or only towers that the data never reaches.
    """
    towers = model.parameter_towers()
    trained = {towers[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(
            f"model.freeze {list(model.settings.freeze)} + adapter.type 'none': nothing is trained, and neither "
            "pooling nor projection has weights; free a tower, or add an adapter or a projection"
        )
    if not pictures and trained <= {"vision", "projector"}:
        raise ConfigError(
            f"model.freeze {list(model.settings.freeze)}: only {' and '.join(sorted(trained))} would be trained, but "
            "no record of data.train has an image; free the language tower, or add images"
        )


def restore_weights(folder: str | Path, model: EmbeddingModel) -> None:
    """Puts the trained weights of a checkpoint into a model of the same settings, in place: for resuming a run.

    Raises:
        CheckpointError: files are missing or broken, or the weights belong to another architecture.
    """
    folder = Path(folder)
    _settle(folder)
    for key, value, wanted in _differences(read_settings(folder)[0], model.settings):
        raise CheckpointError(
            f"{folder}: was saved with {key} {value!r}, but the run has {wanted!r}; resume with the settings it was "
            "started with"
        )
    if model.settings.adapter_type != "none":
        _read_adapter(folder / ADAPTER, model)
        _read_head(folder / POOLING, model)
        return
    trusted = model.settings.trust_remote_code
    saved, _ = load_checkpoint(
        folder, trust_remote_code=trusted
    )  # through the loader: a family may save its weights under other names
    _check_fit(folder, model.state_dict(), saved.state_dict())
    model.load_state_dict(saved.state_dict())


def read_settings(path: str | Path) -> tuple[EmbedderSettings, dict[str, Any]]:
    """The settings of a checkpoint and the whole of `mmembed.json`."""
    file = Path(path) / SETTINGS
    try:
        described = json.loads(file.read_text())
        if described["format"] > FORMAT:
            raise CheckpointError(f"{file}: format {described['format']} is newer than this mmembed; upgrade mmembed")
        settings = {key: value for key, value in described["settings"].items() if key != "trust_remote_code"}
        return EmbedderSettings(**settings), described
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a settings file of mmembed ({error}); restore it from another copy"
        ) from error


def verify_checkpoint(
    folder: str | Path, model: EmbeddingModel, preprocessor: Preprocessor, tolerance: float = 1e-3
) -> float:
    """Reloads a saved folder and compares vectors of fixed texts (and a picture): equal to the model's; unequal to the
    bare backbone's, or, where only pooling and projection are trained, those unequal to their fresh state. Records the
    vectors in the folder where saving could not.

    Returns:
        The largest difference of a vector element to the model in memory.

    Raises:
        CheckpointError: the vectors differ by more than `tolerance`, or training changed nothing.
    """
    ours = _vectors_of(model, preprocessor)
    reloaded, loaded_preprocessor = load_checkpoint(
        folder, device=model.device, media=preprocessor.media, trust_remote_code=model.settings.trust_remote_code
    )
    theirs = _vectors_of(reloaded, loaded_preprocessor)
    difference = (ours - theirs).abs().max().item()
    if difference > tolerance:
        raise CheckpointError(
            f"{folder}: reloaded vectors differ by {difference:.2g} from the model in memory; "
            "do not use this folder, save again"
        )
    if any(parameter.requires_grad for parameter in reloaded.backbone.parameters()):
        unchanged = torch.equal(theirs, _untrained_vectors(reloaded, loaded_preprocessor))
    else:
        unchanged = head_sums(reloaded) == model.fresh_head
    if unchanged:
        raise CheckpointError(
            f"{folder}: gives the vectors of the backbone before training; its weights were lost, or never trained"
        )
    if not (Path(folder) / PROBES).exists():
        _record(Path(folder), model, ours)
    return difference


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
    recorded = _read_tensors(file)["vectors"].double()
    with safe_open(file, "pt") as header:
        dtypes = {header.metadata()["dtype"], str(model.dtype)}
    found = _flat(_vectors_of(model, preprocessor)).double()
    if found.shape != recorded.shape:
        raise CheckpointError(
            f"{folder}: gives vectors {tuple(found.shape)}, {tuple(recorded.shape)} were recorded when it was saved; "
            "its tokenizer or settings changed, restore them"
        )
    distance = (F.normalize(found, dim=1) - F.normalize(recorded, dim=1)).norm(dim=1).max().item()
    if not distance <= (tolerance if dtypes == {"torch.float32"} else max(tolerance, HALF_TOLERANCE)):
        raise CheckpointError(
            f"{folder}: its vectors are {distance:.2g} away from those recorded when it was saved; its weights, its "
            f"backbone '{model.settings.name_or_path}' or a library changed; restore them, or train again"
        )
    return distance


_PROBES = ("a red bus", "What is the capital of France?", "Der Hund schläft. " * 8)


def _vectors_of(model: EmbeddingModel, preprocessor: Preprocessor) -> torch.Tensor:
    """Vectors of fixed inputs in evaluation mode: texts in both roles, and a picture where the backbone sees."""
    items = [Item((Text(text),), role) for text in _PROBES for role in ("query", "document")]
    if model.family.multimodal:
        picture = PIL.Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        items.append(Item((Image(picture),)))
    was_training = model.training
    vectors = _vectors(model.eval(), preprocessor, items)
    model.train(was_training)
    return vectors


def _flat(vectors: torch.Tensor) -> torch.Tensor:
    """One row an input: the sum over its tokens for multi-vector models."""
    return vectors.sum(1) if vectors.dim() == 3 else vectors  # (B, E)


def _record(folder: Path, model: EmbeddingModel, vectors: torch.Tensor) -> None:
    from safetensors.torch import save_file

    staged = folder / f".{PROBES}"
    save_file({"vectors": _flat(vectors).contiguous()}, staged, {"dtype": str(model.dtype)})
    os.replace(staged, folder / PROBES)


def _untrained_vectors(model: EmbeddingModel, preprocessor: Preprocessor) -> torch.Tensor:
    """Vectors with the backbone as it was before training, under the trained pooling."""
    if model.settings.adapter_type in PROMPT_TYPES:  # peft's disable_adapter would ask for a generate method
        base = cast("PreTrainedModel", adapted(model.backbone).get_base_model())
        settings = replace(model.settings, adapter=None)
        bare = EmbeddingModel(base, model.family, model.pooling, model.projection, model.normalize, settings)
        return _vectors_of(bare, preprocessor)
    if model.settings.adapter_type != "none":
        with adapted(model.backbone).disable_adapter():
            return _vectors_of(model, preprocessor)
    fresh, fresh_preprocessor = build_from_settings(model.settings, preprocessor.media)
    fresh.pooling, fresh.projection = model.pooling, model.projection
    return _vectors_of(fresh.to(model.device).eval(), fresh_preprocessor)


@torch.inference_mode()
def _vectors(model: EmbeddingModel, preprocessor: Preprocessor, items: list[Item]) -> torch.Tensor:
    embeddings = model(preprocessor(items).to(model.device))
    vectors = embeddings.vectors if embeddings.mask is None else embeddings.vectors * embeddings.mask.unsqueeze(-1)
    return vectors.cpu()


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
        model.backbone.save_pretrained(str(folder), state_dict=backbone_state)
    else:
        _write_adapter(folder, model, backbone_state)
    head = {
        name: tensor.detach().contiguous().cpu() for name, tensor in state.items() if not name.startswith("backbone.")
    }
    if head:
        save_file(head, folder / POOLING)
    preprocessor.processor.save_pretrained(folder)
    described = {
        "format": FORMAT,
        "mmembed_version": version("mmembed"),
        "settings": {key: value for key, value in asdict(settings).items() if key != "trust_remote_code"},
        "embedding_size": model.embedding_size,
        "architecture": _architecture(model.family.config),
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
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise CheckpointError(
            f"{folder}: adapter tensor '{(empty or ['(none at all)'])[0]}' is empty; under ZeRO-3 gather the "
            "parameters and pass state_dict"
        )
    save_file(tensors, folder / ADAPTER)
    adapted(model.backbone).peft_config["default"].save_pretrained(str(folder))


def _architecture(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }


def _move_into_place(staging: Path, folder: Path) -> None:
    """From the rename on, the new checkpoint is the one that loads: `_settle` finishes what a kill interrupts."""
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if not folder.exists():
        os.replace(staging, folder)
        return
    _settle(folder)
    os.replace(staging, folder / INCOMING)
    _settle(folder)


def _settle(folder: Path) -> None:
    """Moves a complete checkpoint inside `folder` into its place, file by file; may be interrupted and repeated."""
    incoming = folder / INCOMING
    if not incoming.is_dir():
        return
    try:
        previous = read_settings(folder)[1]["files"] if (folder / SETTINGS).exists() else []
        if (incoming / SETTINGS).exists():  # else everything was moved already
            kept = set(read_settings(incoming)[1]["files"])
            for file in sorted(incoming.iterdir(), key=lambda file: file.name == SETTINGS):
                if file.name == SETTINGS:  # comes last; an adapter left behind would be loaded on top of full weights
                    for name in {*previous, PROBES} - kept:
                        (folder / name).unlink(missing_ok=True)
                if (folder / file.name).is_dir():
                    shutil.rmtree(folder / file.name)
                os.replace(file, folder / file.name)
        incoming.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: was interrupted while it was saved, and could not be completed ({error}); make it writable and "
            "load it again"
        ) from error


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
    found = _architecture(backbone.config)
    if described.get("architecture") not in (None, found):
        raise CheckpointError(
            f"{shown}: was trained on {described['architecture']}, but '{settings.name_or_path}' is now "
            f"{found}; restore that backbone"
        )
    model, preprocessor = assemble(backbone, settings, media=media)
    if not whole:
        _read_adapter(path / ADAPTER, model)
    _read_head(path / POOLING, model)
    return model, preprocessor


def _read_adapter(file: Path, model: EmbeddingModel) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = _read_tensors(file)
    _check_fit(file, get_peft_model_state_dict(model.backbone), tensors)
    set_peft_model_state_dict(model.backbone, tensors)


def _read_head(file: Path, model: EmbeddingModel) -> None:
    expected = {
        f"{part}.{name}": tensor
        for part, module in (("pooling", model.pooling), ("projection", model.projection))
        if module is not None
        for name, tensor in module.state_dict().items()
    }
    if not expected:
        if file.exists():
            raise CheckpointError(
                f"{file}: holds trained tensors, but '{SETTINGS}' beside it names no pooling or projection that has "
                "any; restore that file, or train again"
            )
        return
    tensors = _read_tensors(file)
    _check_fit(file, expected, tensors)
    model.load_state_dict(tensors, strict=False)  # the backbone is in place already


def _differences(
    saved: EmbedderSettings, settings: EmbedderSettings, adapter: bool = True
) -> Iterator[tuple[str, Any, Any]]:
    """(key, saved value, other value) of the settings under which the same weights are another function."""
    from mmembed.config import AdapterConfig

    for key in ("attention", "revision", "normalize", "projection"):
        where = f"model.{key}" if key in ("attention", "revision") else key
        yield from _unequal(where, vars(saved)[key], vars(settings)[key])
    for pair in _unequal("pooling", *(_spelt_out(one.pooling) for one in (saved, settings))):
        yield pair[0], saved.pooling, settings.pooling
    if not adapter or saved.adapter_type == settings.adapter_type == "none":
        return
    usual = AdapterConfig().model_dump(mode="json")
    blocks = [usual | (one.adapter or {"type": "none"}) for one in (saved, settings)]
    for key in sorted(usual.keys() - {"dropout"}):
        yield from _unequal(f"adapter.{key}", blocks[0][key], blocks[1][key])
    yield from _unequal("model.freeze", sorted(saved.freeze), sorted(settings.freeze))


def _unequal(key: str, saved: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if saved != other:
        yield key, saved, other


def _spelt_out(block: str | dict[str, Any]) -> dict[str, Any]:
    """A pooling block with its defaults: `mean` and `{type: mean}` are one pooling."""
    written = {"type": block} if isinstance(block, str) else block
    parameters = inspect.signature(POOLINGS.get(written["type"])).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty} | written


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken ({error}); restore it or train again") from error


def _check_fit(file: Path, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise CheckpointError(
            f"{file}: does not fit this architecture ({len(expected.keys() ^ found.keys())} names differ, "
            f"first '{odd}'); it belongs to another backbone or pooling"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{file}: '{name}' is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}; "
                "it belongs to another backbone or pooling"
            )
