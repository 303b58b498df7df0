"""Fuses checkpoints of one backbone into a checkpoint of its own, in float32, tensor by tensor.

What each tensor of a model is worth, `mmembed.fusion.sources` reads; by which weights they are summed, a rule says
(`mmembed.fusion.rules`); the sum is rounded once, to the type that is written. The folder appears when all of it is on
disk, and describes itself: it loads like any other, and `fusion.json` says what was fused.

Memory: one shard of what is written, and of one tensor as many float32 copies as there are models, and three. Time:
that of reading all models once (twice, with the record of their digests) and writing one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmembed.backbones.loading import DTYPES, load_processor, resolve_backbone
from mmembed.errors import CheckpointError, ConfigError, nearest
from mmembed.fusion.rules import RULES, Rule
from mmembed.fusion.sources import Source, Start, Stored, chain_of, open_source
from mmembed.models.checkpoint import describe
from mmembed.models.folder import POOLING, move_into_place
from mmembed.progress import bar
from mmembed.staging import staging
from mmembed.version import __version__

RECORD = "fusion.json"
SHARD = "2GB"
Heads = Literal["rule", "mean"]
# Settings under which the same weights are another function, or the same text another input.
AGREED = ("attention", "pooling", "normalize", "projection", "prompt", "lengths", "head")


@dataclass(frozen=True)
class Fusion:
    """Models that can be fused, with the rule.

    Attributes:
        base: what they started from, where the rule needs it.
        heads: how tensors of pooling, projection and head are fused where the base has none: `rule` refuses where it
            needs one, `mean` takes their mean.
    """

    sources: tuple[Source, ...]
    rule: Rule
    base: Source | None
    heads: Heads
    told: dict[str, Any]  # the rule as it was given

    @property
    def layout(self) -> Source:
        """Whose files say what tensors are called and how they are stored: a whole model's, else the backbone's."""
        return next((one for one in self.sources if one.is_whole), self.sources[0])

    def changed(self, name: str) -> list[Tensor] | None:
        """Each model's tensor of the backbone, pooling, projection or head; None where the files say that no model's
        differs from the others' and the start's, or where it is not the rule's to fuse."""
        first = self.sources[0]
        if name in first.head:
            return None if self.heads == "mean" else [one.head[name].read() for one in self.sources]
        everyone = [*self.sources, *([] if self.base is None else [self.base])]
        if all(name not in one.added and one.stored[name] == first.stored[name] for one in everyone):
            return None
        return [one.read(name) for one in self.sources]


def fuse(
    models: Sequence[str | Path],
    output: str | Path,
    rule: str | Mapping[str, Any] = "uniform",
    *,
    base: str | None = None,
    heads: Heads = "rule",
    dtype: str = "auto",
    max_shard_size: str = SHARD,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fuses checkpoints into the folder `output`; what lies there survives any failure.

    Args:
        models: folders of embedders, or of rerankers.
        rule: a name of `mmembed.fusion.rules`, or a block {type: name, option: value}.
        base: what the models started from, for rules that need it (default: the last thing that all of them come from);
            and the backbone of adapters whose own is not there.
        heads: `mean` takes the mean of pooling, projection and head, where a rule needs a start and those have none.
        dtype: float32, bfloat16 or float16; auto: float32 if a model says so in its settings, else as stored.
        max_shard_size: of a file of weights, with its unit.
        record: more that `fusion.json` is to say.

    Returns:
        What `fusion.json` says.

    Raises:
        CheckpointError: a model or its backbone is missing or broken, models do not fit each other, a fused tensor is
            not finite, or the disk is full.
        ConfigError: an unknown rule or option, or one that cannot fuse these models.
    """
    fusion = prepare(models, rule, base=base, heads=heads)
    return write(fusion, Path(output), dtype=dtype, max_shard_size=max_shard_size, record=record)


def prepare(
    models: Sequence[str | Path], rule: str | Mapping[str, Any], *, base: str | None = None, heads: Heads = "rule"
) -> Fusion:
    """Opens the models and checks that they fit each other and the rule. Reads no weights. Raises as `fuse`."""
    built = RULES.build(rule)
    built.check(len(models))
    sources = tuple(open_source(model, base) for model in models)
    check_agreement(sources)
    start = _start(sources, base) if built.relative else None
    if base is not None and not built.relative and not any(_replaced(one) for one in sources):
        raise ConfigError(
            f"--base {base}: rule {built.name} needs no start, and every model has its backbone; remove it"
        )
    told = {"type": rule} if isinstance(rule, str) else dict(rule)
    fusion = Fusion(sources, built, start, heads, told)
    heads_without = start is not None and bool(sources[0].head) and start.head.keys() != sources[0].head.keys()
    if start is not None and heads_without and heads == "rule":
        raise ConfigError(
            f"rule {built.name}: needs what '{next(iter(sources[0].head))}' was before training, and '{start.given}' "
            "has no such tensor; give --heads mean to take the mean of pooling, projection and head, or as --base the "
            "checkpoint that the models started from"
        )
    if heads == "mean" and not heads_without:
        raise ConfigError("--heads mean: has no effect, because the rule fuses all tensors of these models; remove it")
    return fusion


def check_agreement(sources: Sequence[Source]) -> None:
    """Raises CheckpointError unless the models are of one backbone and differ in their weights alone."""
    first, *others = sources
    if first.settings is None or any(one.settings is None for one in others):
        name = next(one.given for one in sources if one.settings is None)
        raise CheckpointError(
            f"{name}: is a bare backbone; give folders that training or Embedder.save has written, and a backbone as "
            "--base"
        )
    for other in others:
        differing = [key for key in AGREED if _setting(first, key) != _setting(other, key)]
        if differing:
            values = "; ".join(f"{key} {_setting(first, key)!r} and {_setting(other, key)!r}" for key in differing)
            raise CheckpointError(
                f"{first.given} and {other.given}: differ in {values}; fuse models that were trained with the same"
            )
        for kind, ours, theirs in (
            ("backbone", first.stored, other.stored),
            ("pooling, projection or head", first.head, other.head),
        ):
            _check_shapes(first.given, other.given, kind, ours, theirs)
        if _tokens(first) != _tokens(other):
            raise CheckpointError(f"{first.given} and {other.given}: have different tokenizers; they cannot be fused")
        _check_root(first, other.given, other.chain)


def _setting(source: Source, key: str) -> Any:
    value = vars(source.settings)[key]
    return {"type": value} if key in ("pooling", "prompt") and isinstance(value, str) else value


def _check_shapes(one: str, other: str, kind: str, ours: Mapping[str, Stored], theirs: Mapping[str, Stored]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [stored[name].shape if name in stored else None for stored in (ours, theirs)]
        if shapes[0] != shapes[1]:
            found = " and ".join("missing" if shape is None else str(shape) for shape in shapes)
            raise CheckpointError(
                f"{one} and {other}: '{name}' of the {kind} is {found}; fuse models of one architecture"
            )


def _tokens(source: Source) -> Any:
    file = Path(resolve_backbone(source.given)) / "tokenizer.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text(encoding="utf-8"))
    return told["model"], told["added_tokens"]


# The start ------------------------------------------------------------------------------------------------------------


def _start(sources: Sequence[Source], base: str | None) -> Source:
    """What the models started from: the one that is given, else the last thing that all of them come from."""
    if base is None:
        others = [{step.place for step in one.chain[1:]} for one in sources]
        common = (step for step in sources[0].chain[1:] if all(step.place in steps for steps in others))
        step = next(common, sources[0].chain[-1])
        try:
            start = open_source(step.name, revision=step.revision)
        except CheckpointError as error:
            raise CheckpointError(
                f"{sources[0].given}: what it started from cannot be read ({error}); name a copy of it with --base"
            ) from error
    else:
        start = open_source(base)
        _check_root(sources[0], base, start.chain)
    _check_shapes(sources[0].given, start.given, "backbone", sources[0].stored, start.stored)
    return start


def _check_root(source: Source, other: str, chain: Sequence[Start]) -> None:
    """Raises CheckpointError unless two chains end at one backbone, by its name or by its weights."""
    one, two = source.chain[-1], chain[-1]
    if one.place == two.place or (
        all(Path(step.place[0]).is_dir() for step in (one, two))
        and open_source(one.name).digest() == open_source(two.name).digest()
    ):
        return
    raise CheckpointError(
        f"{source.given} and {other}: were trained from different backbones, '{one}' and '{two}'; weights of different "
        "starts have no common meaning. Fuse models of one backbone"
    )


def _replaced(source: Source) -> bool:
    """Whether an adapter was opened with another backbone than it names."""
    return [step.place for step in chain_of(source.given)] != [step.place for step in source.chain]


# Writing --------------------------------------------------------------------------------------------------------------


def write(
    fusion: Fusion,
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = SHARD,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the fused checkpoint. Arguments and errors as of `fuse`."""
    wanted = _dtype(fusion, dtype)
    given = [*fusion.sources, *([] if fusion.base is None else [fusion.base])]
    for one in given:
        if Path(resolve_backbone(one.given)).resolve() == output.resolve():
            raise ConfigError(f"--output {output}: is one of the models that are fused; choose another folder")
    try:
        with staging(output) as staged:
            staged.mkdir()
            weights = _write_backbone(fusion, staged, wanted, max_shard_size) | _write_head(fusion, staged)
            told = _record(fusion, weights) | dict(record or {})
            (staged / RECORD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            _write_description(fusion, staged, wanted)
            open_source(staged)  # all tensors are found by their names, before anything is replaced
            move_into_place(staged, output)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk as exceptions of their own
        raise CheckpointError(
            f"{output}: could not be written ({error}); what lay there is untouched. Free disk space or choose another "
            "folder"
        ) from error
    return told


def _dtype(fusion: Fusion, dtype: str) -> torch.dtype | None:
    """The type that fractions are written in; None: each as it is stored."""
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(f"--dtype: there is no '{dtype}'; {nearest(dtype, [*DTYPES, 'auto'])}")
    if dtype != "auto":
        return DTYPES[dtype]
    told = {one.settings.dtype for one in fusion.sources if one.settings is not None}
    if "float32" in told:
        return torch.float32
    return DTYPES[told.pop()] if len(told) == 1 and told != {"auto"} else None


def _write_backbone(
    fusion: Fusion, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> dict[str, list[float]]:
    """Writes the shards; the weights of each tensor that a model changed."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    stored = fusion.layout.stored
    names = {one.key: name for name, one in stored.items()}
    outlines = {one.key: torch.empty(one.shape, dtype=_written(one, dtype), device="meta") for one in stored.values()}
    try:
        split = split_torch_state_dict_into_shards(
            outlines, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: {error}; write a size with its unit: 2GB") from error
    weights: dict[str, list[float]] = {}
    with bar("fuse", len(names), " tensors") as progress:
        for file, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                tensor, used = _fused(fusion, names[key])
                if used is not None:
                    weights[names[key]] = used
                shard[key] = _rounded(tensor, outlines[key].dtype, names[key])
                progress.update()
            save_file(shard, folder / file, {"format": "pt"})
            del shard, tensor  # before the next one is made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return weights


def _written(stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    if stored.dtype not in _SAFETENSORS:
        raise CheckpointError(f"{stored.file}: '{stored.key}' is stored as {stored.dtype}, which cannot be fused")
    found = _SAFETENSORS[stored.dtype]
    return found if dtype is None or not found.is_floating_point else dtype


_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _fused(fusion: Fusion, name: str) -> tuple[Tensor, list[float] | None]:
    """A tensor of the backbone, and the weights of the rule; None where all models have the same one."""
    tensors = fusion.changed(name)
    if tensors is None:
        return fusion.sources[0].read(name), None
    base = None if fusion.base is None else fusion.base.read(name)
    if not tensors[0].is_floating_point():
        _check_equal(name, fusion.sources, tensors)
        return tensors[0], None
    return _applied(fusion.rule, name, base, tensors)


def _applied(rule: Rule, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    weights = rule.weights(name, base, tensors)
    return rule.combine(base, tensors, weights), weights


def _check_equal(name: str, sources: Sequence[Source], tensors: Sequence[Tensor]) -> None:
    for source, tensor in zip(sources, tensors, strict=True):
        if not tensor.equal(tensors[0]):
            raise CheckpointError(
                f"{sources[0].given} and {source.given}: '{name}' holds whole numbers that differ; they cannot be fused"
            )


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        found = "not finite" if not tensor.isfinite().all() else f"too large for {dtype}"
        raise CheckpointError(f"'{name}': the fused tensor is {found}; check the models, or the weights of the rule")
    return rounded.contiguous()


def fused_heads(fusion: Fusion) -> Iterator[tuple[str, Tensor, list[float]]]:
    """Tensors of pooling, projection and head, with their weights."""
    rule = RULES.build("uniform") if fusion.heads == "mean" else fusion.rule
    for name in fusion.sources[0].head:
        tensors = [one.head[name].read() for one in fusion.sources]
        base = fusion.base.head[name].read() if rule.relative and fusion.base is not None else None
        fused, weights = _applied(rule, name, base, tensors)
        yield name, _rounded(fused, torch.float32, name), weights


def _write_head(fusion: Fusion, folder: Path) -> dict[str, list[float]]:
    """In float32, as training saves them."""
    from safetensors.torch import save_file

    tensors, weights = {}, {}
    for name, tensor, used in fused_heads(fusion):
        tensors[name], weights[name] = tensor, used
    if tensors:
        save_file(tensors, folder / POOLING)
    return weights


def _write_description(fusion: Fusion, folder: Path, dtype: torch.dtype | None) -> None:
    """The backbone's config, the processor, and last `mmembed.json`."""
    first, outline = fusion.sources[0], fusion.layout.outline
    assert first.settings is not None
    config, kind = outline.config, type(outline.model).__name__
    config.architectures = [kind]
    if dtype is not None:
        for one in (config, *(vars(config)[name] for name in config.sub_configs if name in vars(config))):
            one.dtype = dtype
    config.save_pretrained(folder)
    multimodal = "vision_config" in config.to_dict()
    load_processor(resolve_backbone(first.given), multimodal=multimodal).save_pretrained(folder)
    told = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    start = first.chain[-1]
    layers = [set(one.settings.layers) for one in fusion.sources if one.settings is not None]
    settings = replace(
        first.settings, name_or_path=start.name, revision=start.revision, adapter=None, dtype=told,
        layers=tuple(sorted(set.intersection(*layers))),
    )  # fmt: skip
    describe(folder, settings, first.described["embedding_size"], config)


def _record(fusion: Fusion, weights: Mapping[str, list[float]]) -> dict[str, Any]:
    """What was fused, by its digests and weights: one list where all tensors have the same."""
    options = {key: value for key, value in fusion.told.items() if key != "coefficients"}  # those are the weights
    distinct = list(map(list, dict.fromkeys(map(tuple, weights.values()))))
    told: dict[str, Any] = {"mmembed_version": __version__, "rule": options, "heads": fusion.heads}
    told["models"] = [{"path": one.given, "sha256": one.digest()} for one in fusion.sources]
    told["base"] = None if fusion.base is None else {"path": fusion.base.given, "sha256": fusion.base.digest()}
    return told | {"weights": distinct[0] if len(distinct) == 1 else dict(weights)}
