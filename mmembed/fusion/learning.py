"""Learns how much of each model's change goes into each tensor, from a few labelled records (aTLAS).

    theta_b = theta_0b + sum_k Lambda_kb tau_kb,   tau_kb = theta_kb - theta_0b,   Lambda from 0

Zhang et al., Knowledge composition using task vectors with learned anisotropic scaling, arXiv 2407.02880. The gradient
of a coefficient is that of its tensor times the task vector: d L / d Lambda_kb = <d L / d theta_b, tau_kb>. So no graph
reaches the coefficients: a step writes theta into the model, runs the training step of the objective, and each tensor's
gradient is multiplied with its task vectors, and dropped, as soon as it is there.

Memory: the model, its start and K task vectors in float32, of the tensors that training changed, the activations of
`training.token_budget`, and one gradient at a time. Time: that of as many training steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmembed.backbones import load_backbone
from mmembed.config import build_config
from mmembed.config.blocks import EmbedderConfig
from mmembed.data.collate import Batch, Chunk
from mmembed.data.dataset import MixedDataset, media_store
from mmembed.data.streaming import open_source as open_data
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError, MmembedError
from mmembed.fusion.fuse import Fusion, Heads, fused_heads, prepare
from mmembed.models.embedding_model import EmbeddingModel, assemble
from mmembed.objectives import Objective, build_objective
from mmembed.preprocess import Preprocessor
from mmembed.progress import bar
from mmembed.training.arguments import set_seed, training_arguments
from mmembed.training.batch_report import check_sources
from mmembed.training.batches import (
    build_collator,
    chunk_tokens,
    data_seed,
    graded_sources,
    plan_batches,
    sources_apart,
    sources_of_positives,
)
from mmembed.training.gradcache import contrastive_step
from mmembed.training.preflight import preflight
from mmembed.training.trainer import PlannedLoader

TAKEN = ("data", "objective", "training")  # of a training's config; the rest is the models'
USED = ("learning_rate", "max_steps", "per_device_train_batch_size", "seed", "token_budget")  # of `training`
UNUSED = ("dev", "mining", "batch_order")  # of `data`
DEFAULTS: dict[str, Any] = {"learning_rate": 0.05, "max_steps": 60}


@dataclass
class Block:
    """A tensor that training changed.

    start: what it was; vectors: (K, *shape) what each model changed; coefficients: (K,), their gradients in `slopes`.
    """

    name: str
    parameter: nn.Parameter
    start: Tensor
    vectors: Tensor
    coefficients: Tensor
    slopes: Tensor

    @torch.no_grad()
    def place(self) -> None:
        """Writes the sum of start and scaled vectors into the model."""
        scaled = torch.tensordot(self.coefficients, self.vectors, dims=1)  # of the parameter's shape
        self.parameter.copy_(self.start + scaled)

    @torch.no_grad()
    def collect(self, parameter: Tensor) -> None:
        """Adds what the parameter's gradient says of the coefficients, and drops it."""
        assert parameter.grad is not None
        self.slopes += self.vectors.flatten(1) @ parameter.grad.flatten().float()  # (K,)
        parameter.grad = None


@dataclass(frozen=True)
class Learned:
    """coefficients: tensor -> one a model. losses: of each step."""

    coefficients: dict[str, list[float]]
    losses: list[float]


def learn(
    models: Sequence[str | Path],
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    where: str = "config",
    base: str | None = None,
    heads: Heads = "rule",
    device: str | None = None,
) -> Learned:
    """Learns the coefficients of rule `atlas` for some models.

    Args:
        tree: the blocks `data`, `objective` and `training` of a training's config; max_steps is 60 and the learning
            rate 0.05 unless they say otherwise.
        overrides: `a.b=value`, which win.
        where: opens messages about it.
        base, heads: as of `fuse`.
        device: default cuda where there is one.

    Raises:
        ConfigError: the config holds more or cannot work, or the objective needs what learning does not have.
        MmembedError: as `fuse`, and what reading the data raises.
    """
    fusion = prepare(models, {"type": "atlas", "coefficients": {}}, base=base, heads=heads)
    config = _config(fusion, tree, overrides, where)
    objective = _objective(config)
    media = media_store(config.data)
    args = training_arguments(config)
    set_seed(args.seed)
    data = [open_data(source, config.data, media, data_seed(args), objective.title) for source in config.data.train]
    model, preprocessor = _started(fusion)
    check_sources(data, config, objective, preprocessor.family.media)
    preprocessor.media = media
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).train()
    model.give_layers(objective.layers)
    objective = build_objective(config.objective, model.embedding_size, model.depth).to(model.device)
    blocks = list(_blocks(fusion, model))
    if not blocks:
        raise MmembedError("atlas: no model differs from what they started from; there is nothing to scale")
    collator = build_collator(
        config, preprocessor, args, chunk_tokens(config), False, False,
        graded_sources(data, objective), sources_apart(data), None, sources_of_positives(data, objective),
    )  # fmt: skip
    loader = PlannedLoader(
        MixedDataset(data, data_seed(args)), batch_sampler=plan_batches(config, data, args, 1), collate_fn=collator
    )
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(loader))
    losses = _descend(model, preprocessor, objective, blocks, loader, steps, config)
    return Learned({block.name: block.coefficients.tolist() for block in blocks}, losses)


def _config(fusion: Fusion, tree: dict[str, Any], overrides: Sequence[str], where: str) -> EmbedderConfig:
    """The config of a training of the models' kind, with the blocks that are given. Raises ConfigError for what would
    have no effect."""
    for key in [*tree, *(override.split(".")[0].split("=")[0] for override in overrides)]:
        if key not in TAKEN:
            raise ConfigError(f"{where}: {key}: comes from the models; remove it, and keep {', '.join(TAKEN)}")
    settings = fusion.sources[0].settings
    assert settings is not None and fusion.base is not None
    if settings.head is not None:
        raise ConfigError("atlas: coefficients are learned for embedders; fuse rerankers by another rule")
    kept = {key: vars(settings)[key] for key in ("pooling", "normalize", "projection", "prompt", "lengths")}
    training = {**DEFAULTS, **tree.get("training", {})}
    start = {"name_or_path": fusion.sources[0].chain[-1].name, "attention": settings.attention, "dtype": "float32"}
    whole = {**tree, **kept, "training": training, "model": start, "adapter": {"type": "none"}}
    config = build_config(whole, overrides, where=where)
    for block, idle in (
        ("training", config.training.model_fields_set.union(config.training.model_extra or ()).difference(USED)),
        ("data", config.data.model_fields_set.intersection(UNUSED)),
    ):
        for key in sorted(idle):
            raise ConfigError(f"{where}: {block}.{key}: has no effect on coefficients; remove it")
    return config


def _objective(config: EmbedderConfig) -> Objective:
    """Raises ConfigError where it needs a second model, or has weights of its own."""
    objective = preflight(config)
    needs = {
        "a teacher": objective.teacher_momentum is not None,
        "a guide": objective.guide_model is not None,
        "the output embedding": bool(objective.predicts),
        "parameters of its own": any(True for _ in objective.parameters()),
    }
    for what, needed in needs.items():
        if needed:
            raise ConfigError(f"objective {objective.title}: needs {what}, and only coefficients are learned here")
    return objective


def _started(fusion: Fusion) -> tuple[EmbeddingModel, Preprocessor]:
    """The model as it was before training, in float32."""
    first, start = fusion.sources[0], fusion.base
    assert first.settings is not None and start is not None
    whole = start.chain[0] if start.is_whole else start.chain[-1]
    backbone = load_backbone(
        whole.name, revision=whole.revision, attention=first.settings.attention, dtype="float32",
        attn_implementation=first.settings.attn_implementation, processor_path=first.given,
    )  # fmt: skip
    settings = replace(first.settings, adapter=None, dtype="float32", name_or_path=whole.name, revision=whole.revision)
    model, preprocessor = assemble(backbone, settings)
    model.requires_grad_(False)
    state = model.state_dict()
    with torch.no_grad():
        for name in start.added:  # an adapter's
            state[f"backbone.{name}"].copy_(start.read(name))
        for name, stored in start.head.items():
            state[name].copy_(stored.read())
        if fusion.heads == "mean":
            for name, tensor, _ in fused_heads(fusion):
                state[name].copy_(tensor)
    return model, preprocessor


def _blocks(fusion: Fusion, model: EmbeddingModel) -> Iterator[Block]:
    """The tensors that training changed, their gradients caught as they come."""
    parameters = dict(model.named_parameters())
    for name in [*(f"backbone.{name}" for name in fusion.sources[0].stored), *fusion.sources[0].head]:
        tensors = fusion.changed(name.removeprefix("backbone."))
        if tensors is None or name not in parameters:
            continue
        parameter = parameters[name]
        start = parameter.detach().clone()
        vectors = torch.stack([tensor.to(start.device) - start for tensor in tensors])  # (K, *shape)
        if not vectors.any():
            continue
        zeros = torch.zeros(len(vectors), device=start.device)
        block = Block(name.removeprefix("backbone."), parameter, start, vectors, zeros, zeros.clone())
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(block.collect)
        yield block


def _descend(
    model: EmbeddingModel,
    preprocessor: Preprocessor,
    objective: Objective,
    blocks: Sequence[Block],
    loader: PlannedLoader,
    steps: int,
    config: EmbedderConfig,
) -> list[float]:
    """Adam on the coefficients, its rate falling to 0 along a cosine; the loss of each step."""
    rate = float(config.training.arguments["learning_rate"])
    optimizer = torch.optim.Adam([block.coefficients for block in blocks], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def encode(chunk: Chunk) -> Embeddings:
        return model(chunk.inputs(preprocessor).to(model.device))

    losses: list[float] = []
    with bar("learn", steps, " steps") as progress:
        for batch in _batches(loader, steps):
            for block in blocks:
                block.slopes.zero_()
            loss, _ = contrastive_step(encode, objective, batch, config.training.token_budget)
            for block in blocks:
                block.coefficients.grad = block.slopes
            optimizer.step()
            schedule.step()
            objective.commit()
            for block in blocks:
                block.place()
            losses.append(float(loss))
            progress.update()
    return losses


def _batches(loader: PlannedLoader, steps: int) -> Iterator[Batch]:
    epoch = 0
    while steps > 0:
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch
            steps -= 1
            if steps == 0:
                return
        epoch += 1
