"""What a training run starts from: a bare backbone, a saved embedder (a second stage), or its own last checkpoint.

Saved weights go only into the architecture they were saved with; what may be set anew is listed in `inherit_settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmembed.backbones import resolve_backbone
from mmembed.backbones.loading import media_read
from mmembed.config import build_config
from mmembed.config.blocks import AdapterConfig, EmbedderConfig
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.checkpoint import load_checkpoint, read_adapter, read_head
from mmembed.models.embedding_model import (
    EmbedderSettings,
    EmbeddingModel,
    block_of,
    build_embedding_model,
    build_from_settings,
    settings_of,
)
from mmembed.models.folder import ADAPTER, POOLING, SETTINGS, check_fit, read_settings, settle
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Preprocessor

if TYPE_CHECKING:
    from mmembed.media import MediaStore


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
        new_head = settings.head is not None and _block(settings) != _block(saved)
        head = settings.head if new_head else saved.head
        of_base = replace(settings, name_or_path=base, revision=saved.revision, head=head, domains=saved.domains)
        model, preprocessor = build_from_settings(of_base, media, fresh=new_head)
        if not whole:
            read_adapter(folder / ADAPTER, model)
        if not new_head:
            read_head(folder / POOLING, model)
    check_trainable(model)
    return model, preprocessor


def backbone_of(settings: EmbedderSettings) -> tuple[str, str | None]:
    """Name and revision of the backbone whose layers a run has: of a saved adapter it lies elsewhere."""
    folder = Path(resolve_backbone(settings.name_or_path))
    if (folder / SETTINGS).exists():
        saved, _ = read_settings(folder)
        if saved.adapter_type != "none":
            return saved.name_or_path, saved.revision
    return settings.name_or_path, settings.revision


def reads_media(cfg: EmbedderConfig) -> frozenset[str]:
    """Which media the backbone of a run reads; its weights are not read. Raises ConfigError where it is not there."""
    name, revision = backbone_of(settings_of(cfg))
    return media_read(name, revision, cfg.model.trust_remote_code)


def inherit_settings(cfg: EmbedderConfig) -> EmbedderConfig:
    """The config of a run that starts from a saved embedder: what it leaves unset comes from that `mmembed.json`.

    Prompt, lengths, dtype, dropout, a reranker's head, and of a fully trained model the frozen towers and a new
    adapter, may be set anew; the architecture (attention, pooling, projection, normalisation, the saved adapter) may
    not. A head that is another than the saved one starts as that of a bare backbone. The config of a bare backbone
    comes back as it is.

    Raises:
        ConfigError: the config sets a part of the architecture to another value than the saved one.
    """
    folder = Path(resolve_backbone(cfg.model.name_or_path))
    settle(folder)
    if not (folder / SETTINGS).exists():
        return cfg
    saved, _ = read_settings(folder)
    given, name = cfg.adapter.model_fields_set, cfg.model.name_or_path
    if (saved.head is None) != (cfg.head is None):
        is_, goes_on = ("an embedder", "train_embedder") if saved.head is None else ("a reranker", "train_reranker")
        raise ConfigError(
            f"model.name_or_path: '{name}' is {is_}; go on with it by recipes/{goes_on}.py, or start from the language "
            "model that it was made of"
        )
    renewed = saved.adapter_type == "none" and bool(given) and cfg.adapter.type != "none"
    if "type" in given and not renewed and cfg.adapter.type != saved.adapter_type:
        raise ConfigError(
            f"adapter.type '{cfg.adapter.type}': '{name}' was saved with '{saved.adapter_type}'; go on with that "
            "adapter, or merge it into its backbone first"
        )
    for source in cfg.data.train:
        if source.domain not in (*saved.domains, None):
            raise ConfigError(
                f"data.train '{source.name}': domain '{source.domain}', but '{name}' was saved with "
                f"{list(saved.domains) or 'none'}; remove it, or start from its backbone"
            )
    tree = cfg.model_dump(mode="json", exclude_unset=True)
    of_model = ("revision", "attention", "dtype", "attn_implementation", "freeze")
    tree["model"] = {key: vars(saved)[key] for key in of_model} | tree.get("model", {})
    tree["lengths"] = saved.lengths | tree.get("lengths", {})
    tree = {key: vars(saved)[key] for key in ("pooling", "normalize", "projection", "prompt")} | tree
    if saved.head is not None:
        tree = {"head": _block(saved)} | tree
    if not renewed:
        usual = AdapterConfig().model_dump(mode="json")
        held = saved.adapter or {"type": "none"}
        unusual = {key: value for key, value in held.items() if key == "type" or value != usual[key]}
        tree["adapter"] = unusual | tree.get("adapter", {})
    merged = build_config(tree, where=name, kind=type(cfg))
    settings = replace(settings_of(merged), head=saved.head)  # which may be another
    for key, value, wanted in _differences(saved, settings, adapter=not renewed):
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
    if not pictures and trained <= {"vision", "audio", "projector"}:
        raise ConfigError(
            f"model.freeze {list(model.settings.freeze)}: only {' and '.join(sorted(trained))} would be trained, but "
            "no record of data.train has an image; free the language tower, or add images"
        )


def check_same_settings(folder: str | Path, model: EmbeddingModel) -> None:
    """Refuses to resume from a checkpoint of another architecture. Raises CheckpointError."""
    folder = Path(folder)
    settle(folder)
    for key, value, wanted in _differences(read_settings(folder)[0], model.settings):
        raise CheckpointError(
            f"{folder}: was saved with {key} {value!r}, but the run has {wanted!r}; resume with the settings it was "
            "started with"
        )


def restore_weights(folder: str | Path, model: EmbeddingModel) -> None:
    """Puts the trained weights of a checkpoint into a model of the same settings, in place: for resuming a run.

    Raises:
        CheckpointError: files are missing or broken, or the weights belong to another architecture.
    """
    folder = Path(folder)
    check_same_settings(folder, model)
    if model.settings.adapter_type != "none":
        read_adapter(folder / ADAPTER, model)
        read_head(folder / POOLING, model)
        return
    trusted = model.settings.trust_remote_code
    saved, _ = load_checkpoint(
        folder, trust_remote_code=trusted
    )  # through the loader: a family may save its weights under other names
    check_fit(folder, model.state_dict(), saved.state_dict())
    model.load_state_dict(saved.state_dict())


def _differences(
    saved: EmbedderSettings, settings: EmbedderSettings, adapter: bool = True
) -> Iterator[tuple[str, Any, Any]]:
    """(key, saved value, other value) of the settings under which the same weights are another function."""
    for key in ("attention", "revision", "normalize", "projection"):
        where = f"model.{key}" if key in ("attention", "revision") else key
        yield from _unequal(where, vars(saved)[key], vars(settings)[key])
    yield from _unequal("head", _block(saved), _block(settings))
    for pair in _unequal("pooling", *(_spelt_out(one.pooling) for one in (saved, settings))):
        yield pair[0], saved.pooling, settings.pooling
    if not adapter or saved.adapter_type == settings.adapter_type == "none":
        return
    usual = AdapterConfig().model_dump(mode="json")
    blocks = [usual | (one.adapter or {"type": "none"}) for one in (saved, settings)]
    for key in sorted(usual.keys() - {"dropout"}):
        yield from _unequal(f"adapter.{key}", blocks[0][key], blocks[1][key])
    yield from _unequal("model.freeze", sorted(saved.freeze), sorted(settings.freeze))


def _block(settings: EmbedderSettings) -> dict[str, Any] | None:
    return None if settings.head is None else block_of(settings.head)


def _unequal(key: str, saved: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if saved != other:
        yield key, saved, other


def _spelt_out(block: str | dict[str, Any]) -> dict[str, Any]:
    """A pooling block with its defaults: `mean` and `{type: mean}` are one pooling."""
    written = {"type": block} if isinstance(block, str) else block
    pooling = POOLINGS.get(written["type"])
    parameters = inspect.signature(pooling).parameters.values()
    block = {one.name: one.default for one in parameters if one.default is not one.empty} | written
    return {key: pooling.unset.get(key) if value is None else value for key, value in block.items()}
