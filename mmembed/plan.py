"""What a training run will need, told before it: without a GPU and without weights.

Reads the config, the data (the records are cached as the run itself would), config.json and the processor of the
backbone. Batches are the run's own: planned, drawn, tokenized and cut into chunks by the code that trains, so tokens
and negatives are measured on a sample of them. Memory is that of `mmembed.training.memory`; what stands beside it
(weights, gradients, optimizer, ZeRO's shares) is arithmetic on the parameters of the outlined model. A time is given
only from a throughput that the user states or that was measured here.

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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmembed.backbones import resolve_backbone
from mmembed.backbones.loading import outline_backbone
from mmembed.config.blocks import EmbedderConfig, TrainingConfig
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.collate import Batch, Collator, plan_chunks
from mmembed.data.dataset import MixedDataset, RecordDataset, media_store
from mmembed.data.mixing import mixing_weights
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.continuing import inherit_settings
from mmembed.models.embedding_model import EmbeddingModel, assemble, settings_of
from mmembed.models.folder import SETTINGS, read_settings
from mmembed.objectives import Objective, build_objective
from mmembed.preprocess import Preprocessor
from mmembed.training.arguments import training_arguments
from mmembed.training.batch_report import check_sources, count_negatives, count_visual, keep_tokens
from mmembed.training.gradcache import BUCKET, first_kept
from mmembed.training.memory import (
    Graph,
    Vision,
    measure_chunk,
    measure_objective,
    measure_vision,
    optimizer_bytes,
)
from mmembed.training.out_of_memory import Budget
from mmembed.training.preflight import preflight
from mmembed.training.trainer import chunk_tokens

SAMPLE = 8  # batches that are drawn and tokenized
PICTURES = 4  # that go through a vision tower
_COMPARED = 256  # queries and documents of the comparison that is measured, and scaled
_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # a value: four bits, its scale in eight, the scales' scale (QLoRA)
STAGES = ("0 (DDP)", "1", "2", "3")


@dataclass(frozen=True)
class Stage:
    """Bytes a device under one ZeRO stage, by what takes them."""

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    comparison: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.comparison


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run. Bytes are bytes, tokens are those of one device's batch."""

    devices: int
    parameters: dict[str, tuple[int, int]]  # tower -> (trained, all)
    negatives: dict[str, float]  # own, in_batch, other_processes: a query, at most
    batches_sampled: int
    queries_a_batch: int
    accumulation: int
    tokens: float
    padded_tokens: float
    visual_tokens: float
    longest_input: int
    largest_chunk: int
    chunks: float
    steps: int
    stages: tuple[Stage, ...]
    memory: float | None
    tokens_per_second: float | None  # a device
    throughput_is: str
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of all steps; None without a throughput."""
        if self.tokens_per_second is None:
            return None
        return self.steps * self.accumulation * self.tokens / self.tokens_per_second


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
    config = inherit_settings(config)
    objective = preflight(config)
    args = training_arguments(_with_training(config, without=("deepspeed", "fsdp", "fsdp_config")))
    media = media_store(config.data)
    data = [RecordDataset(s, media, config.data.on_bad_record, root=config.data.root) for s in config.data.train]
    if not data:
        raise ConfigError("data.train: there is no source; add one, for example {path: squad-en, format: beir}")
    check_sources(data, config, objective)
    plan = _batch_plan(config, data, args, devices)
    model, preprocessor = outline(config, media)
    batches = _draw(config, data, plan, preprocessor, args.seed, sample)
    throughput_is = "stated"
    if measure is not None:
        throughput, throughput_is = _measured(config, measure, media), f"measured here over {measure} steps"
    estimate = Estimate(config, model, preprocessor, objective, batches, devices, args)
    steps_an_epoch = math.ceil(len(plan) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
    own, others, remote = (
        _mean([count_negatives(batch, objective, devices)[place] for batch in batches]) for place in range(3)
    )
    stages = estimate.stages()
    return RunPlan(
        devices=devices,
        parameters=estimate.parameters(),
        negatives={"own": own, "in_batch": others, "other_processes": remote},
        batches_sampled=len(batches),
        queries_a_batch=plan.batch_size,
        accumulation=args.gradient_accumulation_steps,
        tokens=_mean([batch.tokens for batch in batches]),
        padded_tokens=_mean([batch.padded_tokens for batch in batches]),
        visual_tokens=_mean(
            [sum(count_visual(chunk.rows, preprocessor) for chunk in batch.chunks) for batch in batches]
        ),
        longest_input=max(len(row) for batch in batches for chunk in batch.chunks for row in chunk.rows),
        largest_chunk=max(chunk.padded_tokens for batch in batches for chunk in batch.chunks),
        chunks=_mean([len(batch.chunks) for batch in batches]),
        steps=steps,
        stages=stages,
        memory=memory,
        tokens_per_second=throughput,
        throughput_is=throughput_is,
        advice=estimate.advice(stages, memory) if memory is not None else (),
        notes=tuple(estimate.notes),
    )


def outline(config: EmbedderConfig, media: MediaStore | None, vision_layers: int | None = None) -> Any:
    """(EmbeddingModel, Preprocessor) of a run, its parameters on the meta device.

    Args:
        vision_layers: cut the vision tower to so many.
    """
    settings = settings_of(config)
    folder = Path(resolve_backbone(settings.name_or_path))
    if (folder / SETTINGS).exists():
        saved, _ = read_settings(folder)
        if saved.adapter_type != "none":  # the folder holds an adapter, its backbone lies elsewhere
            settings = dataclasses.replace(settings, name_or_path=saved.name_or_path, revision=saved.revision)
    adapter = settings.adapter
    if adapter is not None and adapter["type"] == "qlora":  # the same layers; 4 bits are counted by `Estimate`
        settings = dataclasses.replace(settings, adapter={**adapter, "type": "lora"})
    backbone = outline_backbone(
        settings.name_or_path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        attention=settings.attention,
        dtype=settings.dtype,
        attn_implementation="eager" if settings.attn_implementation == "eager" else "sdpa",  # kernels keep the same
        vision_layers=vision_layers,
    )
    with torch.device("meta"):
        model, preprocessor = assemble(backbone, settings, media=media)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, preprocessor


class Estimate:
    """Memory of a run from its outlined model and its drawn batches."""

    def __init__(
        self,
        config: EmbedderConfig,
        model: EmbeddingModel,
        preprocessor: Preprocessor,
        objective: Objective,
        batches: Sequence[Batch],
        devices: int,
        args: Any,
    ) -> None:
        self.config, self.model, self.batches, self.devices = config, model, batches, devices
        self.preprocessor, self.args = preprocessor, args
        self.objective = build_objective(config.objective, model.embedding_size)
        self.notes: list[str] = []
        self.half = bool(args.bf16 or args.fp16)
        self.autocast = torch.bfloat16 if self.half else None
        self.longest = max(max(len(row) for row in chunk.rows) for batch in batches for chunk in batch.chunks)
        self._graphs: dict[bool, Graph] = {}
        self.vision = self._vision()
        self.comparison = self._comparison()
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        self.trained = [(one, id(one) in tables) for one in model.parameters() if one.requires_grad]

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Tower -> (trained, all)."""
        counts: dict[str, tuple[int, int]] = {}
        named = list(self.model.named_parameters())
        towers = self.model.parameter_towers() | {"objective": "objective"}
        for name, parameter in [*named, *(("objective", one) for one in self.objective.parameters())]:
            trained, every = counts.get(towers[name], (0, 0))
            counts[towers[name]] = (
                trained + parameter.numel() * parameter.requires_grad,
                every + parameter.numel(),
            )
        return counts

    def stages(self, token_budget: int | None = None, checkpointing: bool | None = None) -> tuple[Stage, ...]:
        """What each ZeRO stage takes a device, at this token budget (the run's own by default).

        DDP keeps the graphs that the budget holds; ZeRO runs in lockstep: chunks of a whole budget, one graph alive.
        """
        config = self.config if token_budget is None else _with_training(self.config, token_budget=token_budget)
        rows = config.training.chunk_rows
        activations = self.activations(Budget(chunk_tokens(config), rows, keep_tokens(config)), checkpointing)
        lockstep = self.activations(Budget(config.training.token_budget, rows, 0), checkpointing, anew=True)
        trained = sum(parameter.numel() for parameter, _ in self.trained)
        name = str(self.args.optim.value if self.config.training.optimizer is None else self.config.training.optimizer)
        gradients = float(sum(parameter.numel() * parameter.element_size() for parameter, _ in self.trained))
        state, known = optimizer_bytes(name, self.trained)
        if not known and not self.notes:
            self.notes.append(f"the state of optimizer '{name}' is not known here; counted as AdamW's")
        weights = self.weights(half=False)
        copies = min(gradients, 4.0 * BUCKET) if self.devices > 1 else 0.0  # of reduce_gradients
        found = [Stage(STAGES[0], weights, gradients + copies, state, activations, self.comparison)]
        sharded, _ = optimizer_bytes(name, self.trained, master=True)
        sharded += 4.0 * trained  # DeepSpeed steps on a copy in 32 bits, whatever the weights are
        of_engine, of_gradients = self.weights(half=self.half), trained * (2.0 if self.half else 4.0)
        for stage in (1, 2, 3):
            share = of_gradients / self.devices if stage > 1 else of_gradients
            held = of_engine if stage < 3 else of_engine / self.devices + 2 * self._largest_layer()
            found.append(Stage(STAGES[stage], held, share, sharded / self.devices, lockstep, self.comparison))
        return tuple(found)

    def weights(self, half: bool) -> float:
        """Bytes of all weights; `half`: as an engine holds them that casts the model to 16 bits."""
        quantised = self._quantised()
        total = sum(4.0 * one.numel() for one in self.objective.parameters())
        for name, parameter in self.model.named_parameters():
            size = 2.0 if half else float(parameter.element_size())
            total += parameter.numel() * (_BYTES_4BIT if name in quantised else size)
        return total

    def activations(self, budget: Budget, checkpointing: bool | None = None, anew: bool = False) -> float:
        """Bytes that live at the height of a step, for the worst of the drawn batches.

        Kept graphs and the working memory of the first that is sent back; or one recomputed chunk, if that is more.

        Args:
            anew: plan the chunks again (larger ones) instead of cutting those of the run.
        """
        graph = self.graph(self.config.model.gradient_checkpointing if checkpointing is None else checkpointing)
        batches = [_planned_anew(batch, budget) if anew else budget.divide(batch) for batch in self.batches]
        return max(self._of_batch(batch, budget.keep_tokens, graph) for batch in batches)

    def _of_batch(self, batch: Batch, keep: int | None, graph: Graph) -> float:
        tokens = [chunk.padded_tokens for chunk in batch.chunks]
        visual = [count_visual(chunk.rows, self.preprocessor) for chunk in batch.chunks]
        start = first_kept(batch, keep)
        kept = sum(graph.kept(count) for count in tokens[start:]) + self.vision.kept * sum(visual[start:])
        work = [graph.working(count) + self.vision.working * seen for count, seen in zip(tokens, visual, strict=True)]
        alone = [
            graph.kept(count) + self.vision.kept * seen + more
            for count, seen, more in zip(tokens[:start], visual, work, strict=False)
        ]
        return max(kept + max(work[start:], default=0.0), max(alone, default=0.0))

    def graph(self, checkpointing: bool) -> Graph:
        """Measured once with and once without gradient checkpointing."""
        if checkpointing not in self._graphs:
            model, _ = outline(self._with_checkpointing(checkpointing), None)
            self._graphs[checkpointing] = measure_chunk(model, self.longest, self.autocast)
        return self._graphs[checkpointing]

    def advice(self, stages: Sequence[Stage], memory: float) -> tuple[str, ...]:
        """What does not fit, and what would."""
        lines = []
        for place, stage in enumerate(stages):
            if stage.total > memory:
                lines.append(f"ZeRO {stage.name} does not fit: {size(stage.total)} of {size(memory)}")
                lines += [f"  {remedy}" for remedy in self._remedies(place, memory)]
        return tuple(lines)

    def _remedies(self, place: int, memory: float) -> list[str]:
        fitting = [stage.name for stage in self.stages()[place + 1 :] if stage.total <= memory]
        found = [f"ZeRO {fitting[0]} fits"] if fitting and self.devices > 1 else []
        for checkpointing in sorted({self.config.model.gradient_checkpointing, True}):
            budget = self._fitting_budget(place, memory, checkpointing)
            if budget is None:
                continue
            more = (
                ""
                if checkpointing == self.config.model.gradient_checkpointing
                else ("model.gradient_checkpointing: true")
            )
            less = "" if budget == self.config.training.token_budget else f"training.token_budget: {budget}"
            found.append(f"{' and '.join(one for one in (more, less) if one)} fits")
            break
        fixed = self.stages()[place].total - self.stages()[place].activations
        if fixed > memory:
            found.append(
                f"weights, gradients and optimizer alone take {size(fixed)}: an adapter (adapter.type: lora, qlora), "
                "an 8-bit optimizer, or more devices with a higher stage"
            )
        return found or ["no token budget fits: shorter lengths, or a higher stage on more devices"]

    def _fitting_budget(self, place: int, memory: float, checkpointing: bool) -> int | None:
        """The largest token budget of the form configured / 2^k that fits; None where none does."""
        tokens = self.config.training.token_budget
        while tokens >= min(self.longest, self.config.training.token_budget):
            if self.stages(tokens, checkpointing)[place].total <= memory:
                return tokens
            tokens //= 2
        return None

    def _with_checkpointing(self, on: bool) -> EmbedderConfig:
        model = self.config.model.model_copy(update={"gradient_checkpointing": on})
        return self.config.model_copy(update={"model": model})

    def _quantised(self) -> set[str]:
        """Names of the weights that QLoRA keeps in 4 bits: linear layers of the language tower."""
        if self.config.adapter.type != "qlora":
            return set()
        towers = self.model.parameter_towers()
        linear = {f"{name}.weight": part for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}
        return {
            name for name, part in linear.items() if towers.get(name) == "language" and not part.weight.requires_grad
        }

    def _largest_layer(self) -> float:
        """Bytes of the largest decoder layer: what ZeRO-3 gathers while it runs, and the next one with it."""
        layers: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            found = re.search(r"^.*?\.(layers|blocks)\.\d+\.", name)
            if found is not None:
                held = parameter.numel() * (2.0 if self.half else parameter.element_size())
                layers[found[0]] = layers.get(found[0], 0.0) + held
        return max(layers.values(), default=0.0)

    def _comparison(self) -> float:
        """Bytes of the score matrix and what is made of it, scaled from a small comparison."""
        batch = max(self.batches, key=lambda one: one.n_queries * one.n_documents)
        queries, documents = min(batch.n_queries, _COMPARED), min(batch.n_documents, _COMPARED)
        labels = dataclasses.replace(
            batch.labels,
            owner=batch.labels.owner[:documents].clamp_max(queries - 1),
            relevance=batch.labels.relevance[:documents],
            document_keys=batch.labels.document_keys[:documents],
            query_keys=batch.labels.query_keys[:queries],
            positive_keys=batch.labels.positive_keys[:queries],
        )
        many = self.longest if self.model.pooling.multi_vector else 1
        found = measure_objective(self.objective, labels, self.model.embedding_size, many)
        columns = batch.n_documents * (self.devices if self.objective.across_processes else 1)
        return found * (batch.n_queries * columns) / (queries * documents)

    def _vision(self) -> Vision:
        """Of the pictures in the drawn batches; nothing where there are none."""
        rows = [row for batch in self.batches for chunk in batch.chunks for row in chunk.rows if row.images]
        layers = vision_layers_of(self.model.family.config)
        if not rows or layers is None:
            return Vision()
        pictured = sorted(rows, key=len)[-PICTURES:]
        tensors = self.preprocessor.collate(pictured).tensors
        media = {name: tensor for name, tensor in tensors.items() if name not in ("input_ids", "attention_mask")}
        seen = count_visual(pictured, self.preprocessor)

        def build(depth: int) -> EmbeddingModel:
            model, _ = outline(self.config, None, vision_layers=depth)
            return model

        found = measure_vision(build, layers, media, seen, self.autocast)
        if self.config.model.gradient_checkpointing:
            self.notes.append("the vision tower is counted without gradient checkpointing")
        return found


def _planned_anew(batch: Batch, budget: Budget) -> Batch:
    rows = [row for chunk in batch.chunks for row in chunk.rows]
    return dataclasses.replace(batch, chunks=plan_chunks(rows, budget.chunk_tokens, budget.chunk_rows))


def vision_layers_of(config: Any) -> int | None:
    """How many layers a vision tower has; None where there is none."""
    vision = vars(config).get("vision_config")
    if vision is None:
        return None
    return int(next(vars(vision)[key] for key in ("depth", "num_hidden_layers") if key in vars(vision)))


def _with_training(config: EmbedderConfig, without: Sequence[str] = (), **changes: Any) -> EmbedderConfig:
    """The config with other keys in its training block."""
    given = config.training.model_dump(exclude_unset=True)
    kept = {key: value for key, value in given.items() if key not in without}
    return config.model_copy(update={"training": TrainingConfig(**{**kept, **changes})})


def _batch_plan(config: EmbedderConfig, data: Sequence[RecordDataset], args: Any, devices: int) -> BatchPlan:
    sizes = [len(source) for source in data]
    return BatchPlan(
        sizes,
        mixing_weights(sizes, [source.weight for source in config.data.train], config.data.mixing_alpha),
        batch_size=args.per_device_train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=devices,
        keys=[source.keys() for source in data],
        names=[source.name for source in data],
    )


def _draw(
    config: EmbedderConfig,
    data: Sequence[RecordDataset],
    plan: BatchPlan,
    preprocessor: Preprocessor,
    seed: int,
    sample: int,
) -> list[Batch]:
    """Batches evenly spread over the first epoch."""
    collator = Collator(
        preprocessor,
        {source.name: source for source in config.data.train},
        chunk_tokens=chunk_tokens(config),
        chunk_rows=config.training.chunk_rows,
        train_group_size=config.data.train_group_size,
        positives_per_query=config.data.positives_per_query,
        seed=seed,
    )
    mixed, step = MixedDataset(data), max(1, len(plan) // sample)
    return [
        collator([mixed[draw] for draw in draws])
        for number, draws in enumerate(plan)
        if number % step == 0 and number // step < sample
    ]


def _measured(config: EmbedderConfig, steps: int, media: MediaStore) -> float:
    """Tokens a second of a few steps on this machine."""
    from mmembed.models.continuing import build_for_training
    from mmembed.training.trainer import EmbedderTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = _with_training(
            config, ("load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
            output_dir=folder, max_steps=steps + 1, logging_steps=1, save_strategy="no", eval_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        model, preprocessor = build_for_training(config, media)
        data = [RecordDataset(s, media, config.data.on_bad_record, root=config.data.root) for s in config.data.train]
        objective = build_objective(config.objective, model.embedding_size)
        trainer = EmbedderTrainer(config, training_arguments(config), model, preprocessor, objective, data)
        with contextlib.redirect_stdout(sys.stderr):  # what the loop prints is no part of the plan
            trainer.train()
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return sum(speeds[1:]) / len(speeds[1:])  # the first step warms up


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# What is printed ------------------------------------------------------------------------------------------------------


_HEADS = ("weights", "gradients", "optimizer", "graphs", "scores", "in all")


def render(plan: RunPlan) -> str:
    """The plan as text."""
    trained, every = (sum(counts[place] for counts in plan.parameters.values()) for place in (0, 1))
    own, others, remote = plan.negatives.values()
    lines = [f"parameters: {trained:,} trained of {every:,}"]
    lines += [f"  {tower:<10} {mine:>15,} of {whole:,}" for tower, (mine, whole) in plan.parameters.items()]
    lines += [
        f"negatives a query: {own:.1f} own, {others:.0f} in-batch of its process, {remote:.0f} of other processes "
        "(duplicates and known positives do not count)",
        f"a step and device, over {plan.batches_sampled} sampled batches of {plan.queries_a_batch} queries"
        + (f", {plan.accumulation} accumulated" if plan.accumulation > 1 else "") + ":",
        f"  {plan.tokens * plan.accumulation:,.0f} tokens, {plan.visual_tokens * plan.accumulation:,.0f} of them "
        f"visual; {plan.padded_tokens / plan.tokens - 1:.0%} padding; {plan.chunks:.0f} chunks a batch",
        f"  largest chunk {plan.largest_chunk:,} tokens, longest input {plan.longest_input:,}",
        "memory a device, estimated:",
        f"  {'ZeRO':<9} " + " ".join(f"{head:>10}" for head in _HEADS),
    ]  # fmt: skip
    for stage in plan.stages:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.comparison, stage.total)
        over = "" if plan.memory is None or stage.total <= plan.memory else "  does not fit"
        lines.append(f"  {stage.name:<9} " + " ".join(f"{size(part):>10}" for part in parts) + over)
    lines.append("  not counted: the device's context and fragments (0.5 to 1 GB on CUDA), communication buffers")
    lines += [f"  note: {note}" for note in plan.notes]
    lines += list(plan.advice)
    if plan.memory is not None and not plan.advice:
        lines.append(f"all stages fit into {size(plan.memory)}")
    lines.append(f"steps: {plan.steps:,}")
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


_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def read_size(text: str) -> float:
    """`80GB` -> bytes. Raises MmembedError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, flags=re.IGNORECASE)
    unit = "" if found is None else found[2].upper().replace("I", "")
    unit = f"{unit}B" if len(unit) == 1 and unit != "B" else unit
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise MmembedError(f"--memory: found '{text}'; write a size, for example 80GB or 24GB")
    return float(found[1]) * _UNITS[unit]


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"
