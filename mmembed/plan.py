"""What a training run will need, told before it: without a GPU and without weights.

Reads the config, the data (the records are cached as the run itself would, a stream's first ones are read),
config.json and the processor of the backbone. Batches are the run's own: planned, drawn, tokenized and cut into chunks
by the code that trains, so tokens and negatives are measured on a sample of them. Memory is that of
`mmembed.training.estimate`. A time is given only from a throughput that the user states or that was measured here.

Not counted: the device's context and the allocator's fragments (0.5 to 1 GB on CUDA), buffers of the communication
library, data workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmembed.backbones.experts import active_parameters, mixture_of
from mmembed.config import describes_reranker, load_config
from mmembed.config.blocks import EmbedderConfig, EvaluationConfig, RerankerConfig
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.collate import Batch
from mmembed.data.dataset import MixedDataset, media_store, open_dev
from mmembed.data.streaming import RecordStream, Source, open_source
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.continuing import inherit_settings, reads_media
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.vision_cache import TOUCHED, uncached
from mmembed.objectives import Objective, build_objective
from mmembed.preprocess import Preprocessor
from mmembed.training.arguments import training_arguments, with_metric
from mmembed.training.batch_report import (
    APART,
    check_sources,
    count_cut,
    count_negatives,
    count_visual,
    cut_line,
    lost,
    prompt_alone,
)
from mmembed.training.batches import (
    build_collator,
    chunk_tokens,
    data_seed,
    graded_sources,
    longest_allowed,
    plan_batches,
    sources_apart,
    sources_of_positives,
)
from mmembed.training.benchmark import describe
from mmembed.training.estimate import Estimate, Stage, outline, size, with_training
from mmembed.training.launch import divides_weights, launched_with
from mmembed.training.preflight import check_dropout, preflight
from mmembed.training.supply import check_dev, named_parts

if TYPE_CHECKING:
    from transformers import TrainingArguments

SAMPLE = 8  # batches that are drawn and tokenized
OF_THE_DEVICE = ("deepspeed", "fsdp", "fsdp_config", "tf32", "fp16")  # refused where it is not there
OF_EVALUATION = (
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "eval_steps", "eval_delay"),
    *("eval_on_start", "save_steps", "early_stopping_patience", "early_stopping_threshold"),
)


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run. Bytes are bytes, tokens are those of one device's batch."""

    devices: int
    parameters: dict[str, tuple[int, int]]  # tower -> (trained, all)
    active: int | None  # of a mixture of experts, those that a token goes through
    negatives: dict[str, float]  # own, in_batch, other_processes (at most): of a query, without what is masked
    batches_sampled: int
    queries_a_batch: int  # on average, where sources have batches of their own size
    pairs: float | None  # of a query and a document, a batch; None of an embedder, which has none
    logits: int | None  # of a pair
    accumulation: int
    tokens: float
    padded_tokens: float
    saved_tokens: float  # of shared prefixes: in `tokens`, and not computed again
    unshared: str | None  # why no prefixes are shared
    visual_tokens: float
    features: str  # what becomes of the features of images; empty without images
    inputs: int  # of all sampled batches
    cut_inputs: int  # by `lengths`
    lost_share: float  # of the texts of those that are cut, of a pair its document's
    emptied_inputs: int  # of whose texts nothing is left
    longest_input: int
    longest_allowed: int  # text tokens of an input, by `lengths`
    largest_chunk: int
    chunks: float
    steps: int
    epochs: float | None  # None where a source is a stream
    stages: tuple[Stage, ...]
    memory: float | None
    tokens_per_second: float | None  # a device
    throughput_is: str
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    cuts: tuple[str, ...]  # what `lengths` cut, in words
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of all steps; None without a throughput."""
        if self.tokens_per_second is None:
            return None
        return self.steps * self.accumulation * self.tokens / self.tokens_per_second


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> EmbedderConfig:
    """The config of a run, of an embedder or a reranker: a reranker's names a head, the prompt of pairs or an objective
    over their logits.

    Raises:
        ConfigError: as `load_config`; or the objective is unknown.
    """
    if describes_reranker(path, overrides):
        return load_config(path, overrides, RerankerConfig)
    config = load_config(path, overrides)
    judges = any(part.judges for part in named_parts(build_objective(config.objective)))
    return load_config(path, overrides, RerankerConfig) if judges else config


def plan_run(
    config: EmbedderConfig,
    devices: int = 1,
    memory: float | None = None,
    throughput: float | None = None,
    measure: int | None = None,
    sample: int = SAMPLE,
) -> RunPlan:
    """Plans a run.

    Args:
        devices: processes that train together.
        memory: bytes a device has.
        throughput: tokens a second and device, stated by the user.
        measure: train so many steps here, and take their throughput; needs weights.
        sample: batches that are tokenized.

    Raises:
        ConfigError: what the run itself would refuse.
    """
    if not config.data.train:
        raise ConfigError("data.train: there is no source; add one, for example {path: squad-en, format: beir}")
    config, evaluation = inherit_settings(config), config.evaluation
    if evaluation is not None:  # its device is the run's
        config = config.model_copy(update={"evaluation": evaluation.model_copy(update={"device": None})})
    objective = preflight(config)
    launched_with(config, config.training.arguments)
    half = {"bf16": True} if config.training.arguments.get("fp16") else {}  # as many bytes, on any device
    args = training_arguments(with_training(config, without=OF_THE_DEVICE, **half))
    media = media_store(config.data)
    data = [open_source(source, config.data, media, data_seed(args)) for source in config.data.train]
    dev = open_dev(config.data, media)
    check_dev(dev, config)
    with_metric(args, config, dev)
    check_sources(data, config, objective, reads_media(config), devices)
    plan = plan_batches(config, data, args, devices)
    model, preprocessor = outline(config, media)
    check_dropout(config, model.named_modules(), preprocessor.family)
    unshared = _unshared(config, model) or (APART if len(sources_apart(data)) == len(data) else None)
    packed = _packed(config, model)
    batches = _draw(
        config, objective, data, plan, preprocessor, args, sample, share_prefix=unshared is None, packed=packed
    )
    throughput_is = "stated"
    if measure is not None:
        throughput, throughput_is = _measured(config, measure, media), f"measured here over {measure} steps"
    estimate = Estimate(config, model, preprocessor, batches, devices, args, share_prefix=unshared is None)
    stages = estimate.stages()
    steps_an_epoch = math.ceil(len(plan) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
    counted = _count(batches, objective, preprocessor, devices)
    return RunPlan(
        devices=devices,
        parameters=estimate.parameters(),
        active=None if mixture_of(model.family.config) is None else active_parameters(model, model.family.config),
        longest_allowed=longest_allowed(config),
        queries_a_batch=round(_mean([batch.n_queries for batch in batches])),
        pairs=None if config.head is None else _mean([batch.n_documents for batch in batches]),
        logits=None if config.head is None else model.embedding_size,
        accumulation=args.gradient_accumulation_steps,
        unshared=unshared,
        features=_features(config, model, devices) if counted["visual_tokens"] else "",
        steps=steps,
        epochs=None if None in plan.sizes else steps / steps_an_epoch,
        stages=stages,
        memory=memory,
        tokens_per_second=throughput,
        throughput_is=throughput_is,
        advice=estimate.advice(stages, memory) if memory is not None else (),
        notes=(*estimate.notes, *_evaluated(evaluation)),
        cuts=tuple(cut_line(counted["inputs"], counted["cut_inputs"], counted["lost_share"], config)),
        warnings=tuple(prompt_alone(counted["emptied_inputs"], config)),
        **counted,
    )


def _count(batches: Sequence[Batch], objective: Objective, preprocessor: Preprocessor, devices: int) -> dict[str, Any]:
    """What the sampled batches hold, as RunPlan has it."""
    chunks = [chunk for batch in batches for chunk in batch.chunks]
    counts = (count_negatives(batch, objective, devices) for batch in batches)
    own, others, remote = map(_mean, zip(*counts, strict=True))
    inputs, cut, emptied = count_cut(batches)
    return {
        "inputs": inputs,
        "cut_inputs": cut,
        "lost_share": lost(batches),
        "emptied_inputs": emptied,
        "negatives": {"own": own, "in_batch": others, "other_processes": remote},
        "batches_sampled": len(batches),
        "tokens": _mean([batch.tokens for batch in batches]),
        "padded_tokens": _mean([batch.padded_tokens for batch in batches]),
        "saved_tokens": _mean([batch.saved_tokens for batch in batches]),
        "visual_tokens": sum(count_visual(chunk.rows, preprocessor) for chunk in chunks) / len(batches),
        "longest_input": max(len(row) for chunk in chunks for row in chunk.rows),
        "largest_chunk": max(chunk.padded_tokens for chunk in chunks),
        "chunks": len(chunks) / len(batches),
    }


def _draw(
    config: EmbedderConfig,
    objective: Objective,
    data: Sequence[Source],
    plan: BatchPlan,
    preprocessor: Preprocessor,
    args: TrainingArguments,
    sample: int,
    share_prefix: bool,
    packed: bool,
) -> list[Batch]:
    """Batches evenly spread over the first epoch; the first ones where a later one takes reading a stream up to it."""
    graded, apart = graded_sources(data, objective), sources_apart(data)
    positives_only = sources_of_positives(data, objective)
    size = chunk_tokens(config)
    collator = build_collator(
        config, preprocessor, args, size, share_prefix, packed, graded, apart, positives_only=positives_only
    )
    streamed = any(isinstance(source, RecordStream) for source in data)
    step = 1 if streamed else max(1, len(plan) // sample)
    mixed = MixedDataset(data, data_seed(args))
    return [collator([mixed[draw] for draw in draws]) for draws in islice(plan, 0, step * sample, step)]


def _unshared(config: EmbedderConfig, model: EmbeddingModel) -> str | None:
    """Why the run shares no prefixes; None where it does."""
    if config.training.share_prefix == "off":
        return "training.share_prefix is off"
    return _other_attention(config) or model.unshared()


def _packed(config: EmbedderConfig, model: EmbeddingModel) -> bool:
    """Whether the run computes no padding on any device. ConfigError where it insists on that and cannot."""
    if config.training.attention_kernel != "packed":
        return False
    other = _other_attention(config)
    if other is not None:
        raise ConfigError(f"attention_kernel: 'packed' cannot be ({other}); set it to auto or padded")
    return model.unpacked("packed", torch.device("cpu"), model.dtype) is None


def _other_attention(config: EmbedderConfig) -> str | None:
    kernel = config.model.attn_implementation  # the outline has sdpa in the place of kernels
    return None if kernel == "sdpa" else f"attn_implementation is '{kernel}', not 'sdpa'"


def _features(config: EmbedderConfig, model: EmbeddingModel, devices: int) -> str:
    """What becomes of the features of images. Raises ConfigError where the run would."""
    training = config.training
    if training.vision_cache == "off":
        return "not kept (training.vision_cache is off)"
    reason = uncached(model, training=True)
    if reason is None and devices > 1 and divides_weights(training.arguments):
        reason = TOUCHED
    if reason is None:
        return "kept on disk: from the second epoch on the vision tower does not run"
    if training.vision_cache != "auto":
        raise ConfigError(f"training.vision_cache: features of images cannot be kept ({reason}), or remove it")
    return f"not kept ({reason})"


def _measured(config: EmbedderConfig, steps: int, media: MediaStore) -> float:
    """Tokens a second of a few steps on this machine."""
    from mmembed.models.continuing import build_for_training
    from mmembed.training.trainer import EmbedderTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = with_training(
            config, _of_evaluation(config),
            output_dir=folder, max_steps=steps + 1, logging_steps=1, save_strategy="no", eval_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        data_alone = config.data.model_copy(update={"dev": ()})
        config = config.model_copy(update={"data": data_alone, "evaluation": None})
        model, preprocessor = build_for_training(config, media)
        args = training_arguments(config)
        data = [open_source(source, config.data, media, data_seed(args)) for source in config.data.train]
        objective = build_objective(config.objective, model.embedding_size, model.depth)
        trainer = EmbedderTrainer(config, args, model, preprocessor, objective, data)
        with contextlib.redirect_stdout(sys.stderr):  # what the loop prints is no part of the plan
            trainer.train()
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return sum(speeds[1:]) / len(speeds[1:])  # the first step warms up


def _evaluated(evaluation: EvaluationConfig | None) -> tuple[str, ...]:
    """What a benchmark adds to a run, which nothing here counts."""
    return () if evaluation is None else (f"memory and time of evaluations are not counted: {describe(evaluation)}",)


def _of_evaluation(config: EmbedderConfig) -> tuple[str, ...]:
    """Keys of the training block that need a dev evaluation, which a measurement has none of."""
    follows = config.training.arguments.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    return (*OF_EVALUATION, *(("lr_scheduler_type", "lr_scheduler_kwargs") if follows else ()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# What is printed ------------------------------------------------------------------------------------------------------


def _sharing(plan: RunPlan) -> str:
    if plan.unshared is not None:
        return f"none ({plan.unshared})"
    if not plan.saved_tokens:
        return "none (no beginning that enough inputs have in common)"
    saved = plan.saved_tokens * plan.accumulation
    return f"{saved:,.0f} of these tokens ({plan.saved_tokens / plan.tokens:.0%}) are not computed again"


def _compared(plan: RunPlan) -> str:
    """What a query meets."""
    own, others, remote = plan.negatives.values()
    if plan.pairs is None:
        return (
            f"negatives a query: {own:.1f} own, {others:.1f} in-batch of its process (without duplicates and known "
            f"positives), {remote:.0f} of other processes at most"
        )
    return (
        f"pairs a step and device: {plan.pairs * plan.accumulation:,.0f}, {plan.logits} logits each; "
        f"{plan.pairs / plan.queries_a_batch:.1f} documents a query, {own:.1f} of them negatives"
    )


_HEADS = ("weights", "gradients", "optimizer", "graphs", "scores", "in all")


def render(plan: RunPlan) -> str:
    """The plan as text."""
    trained, every = (sum(counts[place] for counts in plan.parameters.values()) for place in (0, 1))
    lines = [f"parameters: {trained:,} trained of {every:,}"]
    lines += [f"  {tower:<10} {mine:>15,} of {whole:,}" for tower, (mine, whole) in plan.parameters.items()]
    if plan.active is not None:
        lines.append(f"  a token goes through {plan.active:,} of them: each layer sends it to some of its experts")
    lines += [
        _compared(plan),
        f"a step and device, over {plan.batches_sampled} sampled batches of {plan.queries_a_batch} queries"
        + (f", {plan.accumulation} accumulated" if plan.accumulation > 1 else "") + ":",
        f"  {plan.tokens * plan.accumulation:,.0f} tokens, {plan.visual_tokens * plan.accumulation:,.0f} of them "
        f"visual; {plan.padded_tokens / (plan.tokens - plan.saved_tokens) - 1:.0%} padding; "
        f"{plan.chunks:.0f} chunks a batch",
        f"  shared prefixes: {_sharing(plan)}",
        *([f"  image features: {plan.features}"] if plan.features else []),
        *(f"  {line}" for line in plan.cuts),
        *(f"  warning: {warning}" for warning in plan.warnings),
        f"  largest chunk {plan.largest_chunk:,} tokens, longest input {plan.longest_input:,} of the sample; `lengths` "
        f"allow {plan.longest_allowed:,} text tokens",
        "memory a device, estimated for the largest of the sampled batches (a lower bound: others may be larger):",
        f"  {'':<9} " + " ".join(f"{head:>10}" for head in _HEADS),
    ]  # fmt: skip
    for stage in plan.stages:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.comparison, stage.total)
        over = "" if plan.memory is None or stage.total <= plan.memory else "  does not fit"
        lines.append(f"  {stage.name:<9} " + " ".join(f"{size(part):>10}" for part in parts) + over)
    lines.append("  not counted: the device's context and fragments (0.5 to 1 GB on CUDA), communication buffers")
    lines += [f"  note: {note}" for note in plan.notes]
    lines += list(plan.advice)
    if plan.memory is not None and not plan.advice:
        lines.append(f"all of them fit into {size(plan.memory)}")
    epochs = "training.max_steps; a stream has no length" if plan.epochs is None else f"{plan.epochs:.3g} epochs"
    lines.append(f"steps: {plan.steps:,} ({epochs})")
    if plan.seconds is None:
        lines.append("time: unknown; state a throughput (--throughput tokens/s a device) or measure one (--measure)")
    else:
        hours = plan.seconds / 3600
        lines.append(f"time: {hours:.2g} h at {plan.tokens_per_second:,.0f} tokens/s a device ({plan.throughput_is})")
    return "\n".join(lines)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain data; bytes and seconds."""
    found = dataclasses.asdict(plan)
    for stage, held in zip(plan.stages, found["stages"], strict=True):
        held["total"] = stage.total
        held["fits"] = None if plan.memory is None else stage.total <= plan.memory
    return {**found, "seconds": plan.seconds}


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_size(text: str) -> float:
    """`80GB` -> bytes. Raises MmembedError, also where there is no unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)\s*", text, flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise MmembedError(f"--memory: found '{text}'; write a size with its unit, for example 80GB or 24GB")
    return float(found[1]) * _UNITS[found[2][0].upper()]
