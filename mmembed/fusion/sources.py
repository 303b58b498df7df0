"""What the tensors of a checkpoint are worth, read one at a time: of an adapter, the backbone's with its product added.

A checkpoint is a folder of mmembed: the whole backbone in files, or an adapter that names its backbone, and the tensors
of pooling and head beside it. Tensors are known by the names that they have in the model (an outline on the meta
device, without memory); which of a file's names is which, transformers' own renaming says. The products of an adapter
are made by peft's own layers, one at a time, in float32: what `merge_and_unload` would give.

Cost: a file is opened for each tensor (about a millisecond), so that no page of it stays mapped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmembed.backbones import Backbone, resolve_backbone
from mmembed.backbones.adapters import apply_adapter
from mmembed.backbones.loading import outline_backbone
from mmembed.config.blocks import PROMPT_TYPES
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.checkpoint import architecture
from mmembed.models.embedding_model import EmbedderSettings
from mmembed.models.folder import ADAPTER, POOLING, SETTINGS, read_settings, settle

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its name there, shape, and type as safetensors writes it (BF16, F32, ...)."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """A copy of it, float32 where it holds fractions."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self.key)
            return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


@dataclass(frozen=True)
class Start:
    """What a model was trained from, as it is told; `place` is the same for two names of one folder."""

    name: str
    revision: str | None = None

    @property
    def place(self) -> tuple[str, str | None]:
        folder = Path(resolve_backbone(self.name))
        return (str(folder.resolve()), None) if folder.is_dir() else (self.name, self.revision)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} ({self.revision})"


@dataclass(frozen=True)
class Source:
    """One model that is fused, or what they started from.

    Attributes:
        given: as the user named it.
        stored: name in the model -> the backbone's tensor.
        added: name in the model -> what makes the model's tensor of the backbone's, for those that an adapter changes.
        head: name -> tensor of pooling, projection and reranker's head.
        outline: of the backbone, without weights.
        settings: None of a bare backbone.
        files: the weights that are its own: an adapter's, not its backbone's.
        chain: itself, what it was trained from, and so on down to the bare backbone.
    """

    given: str
    stored: dict[str, Stored]
    added: dict[str, Callable[[Tensor], Tensor]]
    head: dict[str, Stored]
    outline: Backbone
    settings: EmbedderSettings | None
    described: Mapping[str, Any]
    files: tuple[str, ...]
    chain: tuple[Start, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the folder holds the backbone itself."""
        return self.settings is None or self.settings.adapter_type == "none"

    def read(self, name: str) -> Tensor:
        """A tensor of the backbone, float32 where it holds fractions, with what the adapter adds."""
        tensor = self.stored[name].read()
        return self.added[name](tensor) if name in self.added else tensor

    def digest(self) -> str:
        """sha256 of its weights."""
        return digest_of(self.files)


def digest_of(files: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def open_source(given: str | Path, backbone: str | None = None, revision: str | None = None) -> Source:
    """Opens a checkpoint folder of mmembed, or a bare backbone. Reads headers, no weights.

    Args:
        backbone: takes the place of the one that an adapter names, where that is not there.
        revision: of a bare backbone on the hub.

    Raises:
        CheckpointError: it is no model, files are missing or broken, its backbone is not there or of another
            architecture, or it has an adapter that is no sum of weights.
    """
    path = Path(resolve_backbone(str(given)))
    settle(path)
    if not (path / SETTINGS).is_file():
        outline = _outlined(str(given), str(given), revision)
        stored = _stored(outline, str(given), revision)
        return Source(str(given), stored, {}, {}, outline, None, {}, _files(stored), (Start(str(given), revision),))
    settings, described = read_settings(path)
    _check_adapter(str(given), settings)
    whole = settings.adapter_type == "none"
    name, revision = (str(path), None) if whole else (settings.name_or_path, settings.revision)
    chain = chain_of(str(given))
    if not whole and backbone is not None and not _is_there(name, revision):
        name, revision, chain = backbone, None, (chain[0], *chain_of(backbone))
    outline = _outlined(str(given), name, revision, settings)
    _check_architecture(str(given), name, described, outline)
    stored = _stored(outline, name, revision)
    added, own = ({}, _files(stored)) if whole else _adapter(path, settings, name, revision, stored)
    head = {one.key: one for one in _held(path / POOLING)} if (path / POOLING).is_file() else {}
    files = (*own, str(path / POOLING)) if head else own
    return Source(str(given), stored, added, head, outline, settings, described, files, chain)


def chain_of(name: str) -> tuple[Start, ...]:
    """A model, what it was trained from, and so on down to the bare backbone."""
    chain, step = dict[tuple[str, str | None], Start](), Start(name)
    while step.place not in chain:  # a folder may have been trained from what lay there before
        chain[step.place] = step
        if (Path(step.place[0]) / SETTINGS).is_file():
            saved, _ = read_settings(step.place[0])
            step = Start(saved.name_or_path, saved.revision)
    return tuple(chain.values())


def _check_adapter(given: str, settings: EmbedderSettings) -> None:
    kind = settings.adapter_type
    if kind in PROMPT_TYPES:
        raise CheckpointError(
            f"{given}: adapter '{kind}' adds tokens, not weights, and cannot be fused; train with lora, dora or rslora"
        )
    if kind == "qlora":
        raise CheckpointError(
            f"{given}: adapter 'qlora' was trained on 4-bit weights, and its sum with those of "
            f"'{settings.name_or_path}' would be another model; train with lora"
        )


# The backbone ---------------------------------------------------------------------------------------------------------


def _outlined(given: str, name: str, revision: str | None, settings: EmbedderSettings | None = None) -> Backbone:
    try:
        return outline_backbone(name, revision=revision, attention=None if settings is None else settings.attention)
    except ConfigError as error:
        if "brings python code" in str(error):
            raise CheckpointError(
                f"{given}: '{name}' brings python code of its own, which fusion neither runs nor copies; fuse models "
                "of a backbone that transformers knows"
            ) from error
        if name == given or settings is None or settings.adapter_type == "none":
            raise CheckpointError(f"{given}: {error}") from error
        raise CheckpointError(
            f"{given}: its backbone '{name}' is not there ({error}); restore it, or name a copy of it with --base"
        ) from error


def _is_there(name: str, revision: str | None) -> bool:
    try:
        outline_backbone(name, revision=revision)
    except ConfigError:
        return False
    return True


def _check_architecture(given: str, name: str, described: Mapping[str, Any], outline: Backbone) -> None:
    trained, found = described.get("architecture"), architecture(outline.config)
    if trained not in (None, found):
        raise CheckpointError(f"{given}: was trained on {trained}, but '{name}' is {found}; give that backbone")


def _stored(outline: Backbone, name: str, revision: str | None) -> dict[str, Stored]:
    """name in the model -> tensor of a file. Raises CheckpointError where files do not hold the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model: Any = outline.model
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, found = model.base_model_prefix, dict[str, Stored]()
    for one in _backbone_tensors(name, revision):
        renamed, pattern = rename_source_key(one.key, renamings, converters, prefix, state)
        if renamed not in state and one.key in state:  # as the loader does: the mapping was for another layout
            renamed, pattern = rename_source_key(one.key, [], [], prefix, state)
        if renamed not in state:
            continue  # the output embedding of a language model
        if pattern is not None:
            raise CheckpointError(
                f"{name}: '{one.key}' is a part of '{renamed}', and tensors that files hold in parts cannot be fused; "
                "save the model with transformers' save_original_format=False"
            )
        found[renamed] = one
    shared = {key for key, _ in model.named_parameters()} | {key for key, _ in model.named_buffers()}
    missing = sorted((state.keys() & shared) - found.keys())
    if missing:
        raise CheckpointError(f"{name}: holds no '{missing[0]}' ({len(missing)} tensors are missing); restore it")
    for key, tensor in state.items():
        if key in found and found[key].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name}: '{key}' is {found[key].shape}, its config.json says {tuple(tensor.shape)}; quantized files "
                "cannot be fused, others are to be restored"
            )
    return found


def _backbone_tensors(name: str, revision: str | None) -> list[Stored]:
    from transformers.utils.hub import cached_file

    def local(file: str) -> str | None:
        return cached_file(
            resolve_backbone(name),
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    index = local(INDEX)
    if index is not None:
        named = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        named = [WHOLE]
    files = {file: local(file) for file in named}
    for file, path in files.items():
        if path is None:
            raise CheckpointError(f"{name}: '{file}' is not there; fusion reads safetensors files, restore them")
    return [tensor for path in files.values() if path is not None for tensor in _held(Path(path))]


def _held(file: Path) -> list[Stored]:
    """The tensors of a file. Raises CheckpointError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  no mapping
            return [Stored(str(file), key, tuple(one.get_shape()), one.get_dtype()) for key, one in parts.items()]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken ({error}); restore it or train again") from error


def _files(stored: Mapping[str, Stored]) -> tuple[str, ...]:
    return tuple(sorted({one.file for one in stored.values()}))


# The adapter ----------------------------------------------------------------------------------------------------------


def _adapter(
    path: Path, settings: EmbedderSettings, name: str, revision: str | None, stored: dict[str, Stored]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], tuple[str, ...]]:
    """What an adapter adds to which tensors, and its files."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    assert settings.adapter is not None
    fresh = outline_backbone(name, revision=revision)  # peft changes the model that it is given
    wrapped: Any = apply_adapter(fresh, settings.adapter, settings.freeze)
    state = wrapped.state_dict()
    names = {id(tensor): key for key, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        expected: dict[str, Tensor] = dict(get_peft_model_state_dict(wrapped, state_dict=state))
    held = {one.key: one for one in _held(path / ADAPTER)}
    if expected.keys() != held.keys() or any(held[key].shape != tuple(one.shape) for key, one in expected.items()):
        raise CheckpointError(
            f"{path / ADAPTER}: does not fit '{name}' with the adapter {settings.adapter}; it belongs to another "
            "backbone or adapter"
        )
    of_layers: dict[str, dict[str, Stored]] = {}  # layer -> parameter -> tensor
    layers = {key: module for key, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    for key, tensor in expected.items():
        whole = names[id(tensor)]
        layer = next(one for one in layers if whole.startswith(one + "."))
        of_layers.setdefault(layer, {})[whole.removeprefix(layer + ".")] = held[key]
    added: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer, parameters in of_layers.items():
        weight = layer.removeprefix("base_model.model.") + ".weight"
        if weight not in stored:
            raise CheckpointError(
                f"{path}: its adapter changes '{layer}', which is no single weight; it cannot be fused"
            )
        added[weight] = _Merging(layers[layer], parameters)
    return added, (str(path / ADAPTER),)


@dataclass(frozen=True)
class _Merging:
    """A layer of peft, without weights, and its adapter's tensors: merges a weight as the layer itself would.

    peft saves the whole table beside an adapter of tokens; loading takes it from there, and so does this.
    """

    layer: LoraLayer
    parameters: Mapping[str, Stored]

    def __call__(self, weight: Tensor) -> Tensor:
        layer: Any = copy.deepcopy(self.layer)  # without weights it costs nothing, and it remembers what it merged
        tensors = {name: one.read() for name, one in self.parameters.items()}
        layer.load_state_dict({"base_layer.weight": weight, **tensors}, strict=False, assign=True)
        with torch.no_grad():
            layer.merge()
        merged: Tensor = layer.get_base_layer().weight.detach()
        return merged
