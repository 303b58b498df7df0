"""The memory of a training run, estimated from its outline and a sample of its batches.

Activations are those of `mmembed.training.memory`: the real architecture runs without contents, and what stays alive is
counted. What stands beside them (weights, gradients, optimizer state, shares of ZeRO and FSDP2) is arithmetic on the
parameters of the outlined model. Costs two small forward and backward passes, and the vision tower two layers deep
where pictures are read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmembed.backbones.experts import outline_experts
from mmembed.backbones.loading import outline_backbone
from mmembed.backbones.output_embedding import outline_output_embedding
from mmembed.config.blocks import EmbedderConfig, TrainingConfig
from mmembed.data.collate import Batch, Chunk, plan_chunks
from mmembed.heads import HEADS, Head
from mmembed.media import MediaStore
from mmembed.models.continuing import backbone_of
from mmembed.models.embedding_model import EmbeddingModel, assemble, settings_of
from mmembed.objectives import blocks, build_objective
from mmembed.objectives.blocks import cells_of_a_block
from mmembed.preprocess import Preprocessor
from mmembed.training.batch_report import count_visual, keep_tokens
from mmembed.training.batches import chunk_tokens
from mmembed.training.gradcache import BUCKET, first_kept, whole_parts
from mmembed.training.launch import WHOLE_MATRICES
from mmembed.training.memory import (
    Graph,
    Vision,
    gradient_bytes,
    measure_chunk,
    measure_objective,
    measure_vision,
    optimizer_bytes,
    prefix_copies,
    trained_parameters,
)
from mmembed.training.optimizers import optimizer_name
from mmembed.training.out_of_memory import Budget
from mmembed.training.teacher import teacher_of

PICTURES = 4  # that go through a vision tower
_COMPARED = 256  # queries and documents of the comparison that is measured, and scaled
_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # a value: four bits, its scale in eight, the scales' scale (QLoRA)
DDP, FSDP2 = "DDP", "FSDP2"
STRATEGIES = (DDP, "ZeRO-1", "ZeRO-2", "ZeRO-3", FSDP2)


@dataclass(frozen=True)
class Stage:
    """Bytes a device under one strategy, by what takes them."""

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    comparison: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.comparison


def outline(config: EmbedderConfig, media: MediaStore | None, vision_layers: int | None = None) -> Any:
    """(EmbeddingModel, Preprocessor) of a run, its parameters on the meta device.

    Args:
        vision_layers: cut the vision tower to so many.
    """
    settings = settings_of(config)
    name, revision = backbone_of(settings)
    settings = dataclasses.replace(settings, name_or_path=name, revision=revision)
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
    outline_experts(backbone.model)
    with torch.device("meta"):
        model, preprocessor = assemble(backbone, settings, media=media)
    if build_objective(config.objective).predicts:
        model.output_embedding = outline_output_embedding(model.family, model.dtype)
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
        batches: Sequence[Batch],
        devices: int,
        args: Any,
        share_prefix: bool,
    ) -> None:
        self.config, self.model, self.batches, self.devices = config, model, batches, devices
        self.preprocessor, self.args, self.share_prefix = preprocessor, args, share_prefix
        self.objective = build_objective(config.objective, model.embedding_size, model.depth)
        self.refused = refused(config, devices)
        self.notes = [f"no {', '.join(names)}: {why}" for why, names in _by_reason(self.refused).items()]
        self.half = bool(args.bf16 or args.fp16)
        self.autocast = torch.bfloat16 if self.half else None
        self.longest = max(max(len(row) for row in chunk.rows) for batch in batches for chunk in batch.chunks)
        self._graphs: dict[bool, Graph] = {}
        self.vision = self._vision()
        self.comparison = self._comparison()
        self.trained = trained_parameters(model)
        self.teacher = teacher_of(model, self.objective)
        if self.teacher is not None:
            self.notes.append(f"weights hold a {self.teacher}")
        kept_whole = [] if model.output_embedding is None else model.output_embedding.buffers()
        self.output = float(sum(one.numel() * one.element_size() for one in kept_whole))  # of every strategy

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
        """What each strategy that the run can take takes a device, at this token budget (the run's own by default).

        DDP keeps the graphs that the budget holds; ZeRO and FSDP2 run in lockstep: chunks of a whole budget, one graph
        alive.
        """
        config = self.config if token_budget is None else with_training(self.config, token_budget=token_budget)
        rows = config.training.chunk_rows
        activations = self.activations(Budget(chunk_tokens(config), rows, keep_tokens(config)), checkpointing)
        found = [self._whole(activations)]
        strategies = [name for name in STRATEGIES[1:] if name not in self.refused]
        if strategies:
            lockstep = self.activations(Budget(config.training.token_budget, rows, 0), checkpointing, anew=True)
            found += [
                self._fsdp2(lockstep) if name == FSDP2 else self._zero(int(name[-1]), lockstep) for name in strategies
            ]
        return tuple(found)

    def _whole(self, activations: float) -> Stage:
        gradients = gradient_bytes(self.trained)
        copies = min(gradients, 4.0 * BUCKET) if self.devices > 1 else 0.0  # of reduce_gradients
        held, state = self.weights(half=False), self._state(master=False)
        return Stage(DDP, held + self.output, gradients + copies, state, activations, self.comparison)

    def _zero(self, stage: int, activations: float) -> Stage:
        trained = sum(parameter.numel() for parameter, _ in self.trained)
        state = self._state(master=True) + 4.0 * trained  # it steps on a copy in 32 bits, whatever the weights are
        held, gradients = self.weights(half=self.half), trained * (2.0 if self.half else 4.0)
        if stage > 1:
            gradients /= self.devices
        if stage == 3:
            held = held / self.devices + 2 * self._gathered()[0]
        held += self.output
        return Stage(f"ZeRO-{stage}", held, gradients, state / self.devices, activations, self.comparison)

    def _fsdp2(self, activations: float) -> Stage:
        """In half precision the trained weights and gradients are in 32 bits, what is gathered is in 16.

        4-bit weights stay whole, what is no layer (token tables, norms) is gathered as one, and gradients are whole
        until the last chunk.
        """
        quantised = self._quantised()
        whole = sum(_BYTES_4BIT * one.numel() for name, one in self.model.named_parameters() if name in quantised)
        rest = self.weights(half=False) - whole
        if self.half:
            rest += sum((4.0 - one.element_size()) * one.numel() for one, _ in self.trained)
        layer, others = self._gathered()
        gradients = sum(one.numel() * (4.0 if self.half else one.element_size()) for one, _ in self.trained)
        state = self._state(master=self.half) / self.devices
        held = whole + rest / self.devices + 2 * layer + others + self.output
        return Stage(FSDP2, held, gradients * (1 + 1 / self.devices), state, activations, self.comparison)

    def _state(self, master: bool) -> float:
        """Bytes of the optimizer's state. `master`: in 32 bits whatever the weights are."""
        name = optimizer_name(self.config, self.args)
        state, known = optimizer_bytes(name, self.trained, master=master)
        note = f"the state of optimizer '{name}' is not known here; counted as AdamW's"
        if not known and note not in self.notes:
            self.notes.append(note)
        return state

    def weights(self, half: bool) -> float:
        """Bytes of all weights, a teacher's too; `half`: as an engine holds them that casts the model to 16 bits."""
        quantised = self._quantised()
        total = sum(4.0 * one.numel() for one in self.objective.parameters())
        total += 0 if self.teacher is None else self.teacher.size
        for name, parameter in self.model.named_parameters():
            size = 2.0 if half else float(parameter.element_size())
            total += parameter.numel() * (_BYTES_4BIT if name in quantised else size)
        return total

    def activations(self, budget: Budget, checkpointing: bool | None = None, anew: bool = False) -> float:
        """Bytes that live at the height of a step, for the worst of the drawn batches.

        Kept graphs and the working memory of the first that is sent back; or one recomputed chunk, if that is more.

        Args:
            anew: plan the chunks again (larger ones) instead of cutting those of the run, for an engine in lockstep.
        """
        graph = self.graph(self.config.model.gradient_checkpointing if checkpointing is None else checkpointing)
        batches = [self._planned_anew(batch, budget) if anew else budget.divide(batch) for batch in self.batches]
        return max(self._of_batch(batch, budget.keep_tokens, graph, lockstep=anew) for batch in batches)

    def _planned_anew(self, batch: Batch, budget: Budget) -> Batch:
        rows = [row for chunk in batch.chunks for row in chunk.rows]
        limits = [self.preprocessor.shareable(row) for row in rows] if self.share_prefix else None
        packed = any(chunk.packed for chunk in batch.chunks)
        chunks = plan_chunks(rows, budget.chunk_tokens, budget.chunk_rows, shareable=limits, packed=packed)
        return dataclasses.replace(batch, chunks=chunks)

    def _of_batch(self, batch: Batch, keep: int | None, graph: Graph, lockstep: bool) -> float:
        parts: list[list[int]] = []
        left, start = list(range(len(batch.chunks))), first_kept(batch.chunks, keep)
        if not lockstep and self.objective.part_for(batch.labels.source, batch.labels.task).separable:
            parts, left, start = whole_parts(batch, keep)
        held = [self._of_chunk(chunk, graph) for chunk in batch.chunks]

        def together(chunks: Sequence[int]) -> float:
            working = max((held[number][1] for number in chunks), default=0.0)
            return sum(held[number][0] for number in chunks) + working

        return max(together(one) for one in [*parts, left[start:], *([number] for number in left[:start])])

    def _of_chunk(self, chunk: Chunk, graph: Graph) -> tuple[float, float]:
        """Bytes kept between the passes, and at work in its backward pass."""
        tokens, visual = chunk.padded_tokens, count_visual(chunk.rows, self.preprocessor)
        copies = graph.per_shared_token * chunk.saved_tokens
        kept = graph.kept(tokens) + self.vision.kept * visual + copies
        working = graph.working(tokens) + self.vision.working * visual
        output = self.model.output_embedding
        if output is None:
            return kept, working
        tied: Any = self.model.base.get_input_embeddings()
        size = torch.empty((), dtype=self.autocast or self.model.dtype).element_size()
        tail = chunk.rows[0].tail
        predicted = tokens + chunk.saved_tokens if tail is None else tail.predicted  # of a list its answer alone
        predicting, before = output.memory(predicted, tied.weight, size)
        return kept + predicting, max(working, before)

    def graph(self, checkpointing: bool) -> Graph:
        """Measured once with and once without gradient checkpointing."""
        if checkpointing not in self._graphs:
            model, _ = outline(self._with_checkpointing(checkpointing), None)
            if isinstance(model.projection, Head) and model.projection.lists:
                self._count_lists(model)
            model.give_layers(self.objective.layers)
            graph = measure_chunk(model, self.longest, self.autocast)
            self._graphs[checkpointing] = dataclasses.replace(
                graph, per_shared_token=0.0 if checkpointing else prefix_copies(model, self.autocast)
            )
        return self._graphs[checkpointing]

    def _count_lists(self, model: EmbeddingModel) -> None:
        """Gives the outline a head that reads hidden states, so that a chunk runs without a list."""
        note = "documents of a list are counted as pairs that share their first block, and all layers as trained"
        if note not in self.notes:
            self.notes.append(note)
        model.reads_last = False
        with torch.device("meta"):
            model.projection = HEADS.build("linear", hidden_size=model.config.hidden_size)

    def advice(self, stages: Sequence[Stage], memory: float) -> tuple[str, ...]:
        """What does not fit, and what would."""
        lines = []
        for place, stage in enumerate(stages):
            if stage.total > memory:
                lines.append(f"{stage.name} does not fit: {size(stage.total)} of {size(memory)}")
                lines += [f"  {remedy}" for remedy in self._remedies(place, memory)]
        return tuple(lines)

    def _remedies(self, place: int, memory: float) -> list[str]:
        fitting = [stage.name for stage in self.stages()[place + 1 :] if stage.total <= memory]
        found = [f"{fitting[0]} fits"] if fitting and self.devices > 1 else []
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
                "an 8-bit optimizer, or more devices that divide more"
            )
        return found or ["no token budget fits: shorter lengths, or more devices that divide more"]

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

    def _gathered(self) -> tuple[float, float]:
        """Bytes of the largest decoder layer, which is gathered while it runs, and the next one with it; and of all
        that is in no layer. 4-bit weights are left out: no strategy that divides weights divides them."""
        layers: dict[str, float] = {}
        quantised = self._quantised()
        for name, parameter in self.model.named_parameters():
            if name not in quantised:
                found = re.search(r"^.*?\.(layers|blocks)\.\d+\.", name)
                held = parameter.numel() * (2.0 if self.half else parameter.element_size())
                layer = "" if found is None else found[0]
                layers[layer] = layers.get(layer, 0.0) + held
        return max((held for layer, held in layers.items() if layer), default=0.0), layers.get("", 0.0)

    def _comparison(self) -> float:
        """Bytes of the score matrix and what is made of it, scaled from a small comparison. A reranker's is small: a
        row has a query's own documents, so it is measured as it is."""
        if self.config.head is not None:
            batch = max(self.batches, key=lambda one: one.n_documents)
            part = self.objective.part_for(batch.labels.source, batch.labels.task)
            return measure_objective(part, batch.labels, self.model.embedding_size, 1)
        batch = max(self.batches, key=lambda one: one.n_queries * one.n_documents)
        queries, documents = min(batch.n_queries, _COMPARED), min(batch.n_documents, _COMPARED)
        labels = dataclasses.replace(
            batch.labels,
            owner=batch.labels.owner[:documents].clamp_max(queries - 1),
            relevance=batch.labels.relevance[:documents],
            scores=None if batch.labels.scores is None else batch.labels.scores[:documents],
            document_keys=batch.labels.document_keys[:documents],
            query_keys=batch.labels.query_keys[:queries],
            positive_keys=batch.labels.positive_keys[:queries],
            label_keys=None if batch.labels.label_keys is None else batch.labels.label_keys[:queries],
            label_values=None if batch.labels.label_values is None else batch.labels.label_values[:queries],
        )
        many = self.longest if self.model.pooling.multi_vector else 1
        of_batch = self.objective.part_for(labels.source, labels.task)
        columns = batch.n_documents * (self.devices if of_batch.across_processes else 1)
        scale = batch.n_queries * columns / (queries * documents)
        with cells_of_a_block(round(blocks.CELLS / scale)):
            return scale * measure_objective(of_batch, labels, self.model.embedding_size, many)

    def _vision(self) -> Vision:
        """Of the pictures in the drawn batches; nothing where there are none."""
        rows = [row for batch in self.batches for chunk in batch.chunks for row in chunk.rows if row.images]
        layers = self.model.family.vision_layers
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


def refused(config: EmbedderConfig, devices: int) -> dict[str, str]:
    """Strategy -> why a run of this config would be refused under it (`mmembed.training.launch`, the trainer)."""
    training, found = config.training, {}
    if devices == 1:
        found[FSDP2] = "there is one process and nothing to share"
    if str(training.arguments.get("optim")) == "sgd":
        found[FSDP2] = "training.optim 'sgd'"
    if config.adapter.type == "qlora":
        found["ZeRO-3"] = "adapter.type 'qlora', whose 4-bit weights it would gather and keep"
    if build_objective(config.objective).teacher_momentum is not None:
        found |= dict.fromkeys(("ZeRO-3", FSDP2), "the objective's teacher, whose weights are whole")
    for key, is_so in (
        (
            f"training.optimizer '{training.optimizer}', which needs whole matrices",
            training.optimizer in WHOLE_MATRICES,
        ),
        ("training.grad_cache: false", training.grad_cache is False),
    ):
        if is_so:
            found |= dict.fromkeys(STRATEGIES[1:], key)
    return found


def _by_reason(found: Mapping[str, str]) -> dict[str, list[str]]:
    return {why: [name for name in STRATEGIES if found.get(name) == why] for why in found.values()}


def with_training(config: EmbedderConfig, without: Sequence[str] = (), **changes: Any) -> EmbedderConfig:
    """The config with other keys in its training block."""
    given = config.training.model_dump(exclude_unset=True)
    kept = {key: value for key, value in given.items() if key not in without}
    return config.model_copy(update={"training": TrainingConfig(**{**kept, **changes})})


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"
