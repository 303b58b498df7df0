"""The trainer: transformers.Trainer with another step, other batches and self-describing checkpoints.

Kept of the base class: the loop, TrainingArguments, callbacks, schedules, trackers, clipping, resume. Replaced:
- batches come from a BatchPlan, already this process's share (accelerate must not shard them again);
- the step is `contrastive_step`, whose gradients an engine reduces (`mmembed.training.engines`);
- each tower has its learning rate; evaluation ranks dev sources and scores tasks of a benchmark; a checkpoint is
  `mmembed.json` + safetensors.

Resuming is exact: batches are a pure function of seed, epoch and position, random states are restored.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput, rotate_checkpoints

from mmembed.backbones.output_embedding import load_output_embedding
from mmembed.config.blocks import EmbedderConfig
from mmembed.content import Example
from mmembed.data.batch_plan import Draw
from mmembed.data.collate import Batch, Chunk
from mmembed.data.dataset import MixedDataset, RecordDataset
from mmembed.data.streaming import Source
from mmembed.embeddings import Embeddings
from mmembed.errors import CheckpointError, ConfigError, MmembedError
from mmembed.models.continuing import check_same_settings
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.folder import read_tensors, to_disk
from mmembed.models.probes import vectors_of
from mmembed.models.randomness import draws
from mmembed.models.verification import verify_checkpoint
from mmembed.models.vision_cache import TOUCHED, open_features, uncached
from mmembed.objectives import Objective, View
from mmembed.objectives.gather import gather_counts
from mmembed.preprocess import Preprocessor
from mmembed.threads import NARROW
from mmembed.training.arguments import output_folder, with_metric
from mmembed.training.batch_order import Groups, describe, group_sources, load_groups, order_model, save_groups
from mmembed.training.batch_report import Report, batch_report, check_sources, keep_tokens
from mmembed.training.batches import (
    build_collator,
    chunk_tokens,
    data_seed,
    graded_sources,
    plan_batches,
    predicted_roles,
    sources_apart,
    sources_of_positives,
)
from mmembed.training.benchmark import Benchmark
from mmembed.training.checkpoints import RUN, STATE, check_same_data, describe_run, read_run, writing
from mmembed.training.data_vectors import Encoder, agreed, encoder_of, other_embedder
from mmembed.training.engines import engine_of, offer_on_cpu
from mmembed.training.evaluation import DevSet, build_dev_set, evaluate
from mmembed.training.gradcache import Encode, RandomState, Workers, contrastive_step
from mmembed.training.guide_vectors import GuideVectors, guide_of, guide_vectors
from mmembed.training.health import RECENT, SCALE, gradient_norms, judge, look_at, parts_of
from mmembed.training.memory import optimizer_bytes, trained_parameters
from mmembed.training.optimizers import Lion, optimizer_name, parameter_groups, refuse_idle_rates
from mmembed.training.out_of_memory import Budget, Halving, is_out_of_memory, smaller
from mmembed.training.preemption import Preemption, SaveAfterEpochEnd, start_worker
from mmembed.training.preflight import check_dropout
from mmembed.training.refresh import MODEL, Drawn, Refresh, mined_sources
from mmembed.training.rehearsal import worst_batch
from mmembed.training.report import write_report
from mmembed.training.tally import Tally
from mmembed.training.teacher import Following, refuse_divided, teacher_of
from mmembed.training.trained import Trained

logger = logging.getLogger(__name__)
SUMS = "sums_{}.safetensors"


class PlannedLoader(DataLoader[Example]):
    """A DataLoader whose batches follow the plan's epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class EmbedderTrainer(Trainer):
    """Trains an embedding model.

    Args:
        config: the run.
        args: of `training_arguments(config)`.
        model, preprocessor: of `build_embedding_model(config)`.
        objective: of `build_objective(config.objective)`.
        train, dev: a dataset for each source of config.data, in that order.

    Raises:
        ConfigError: the data carries fields that would go unused, a learning rate is of a tower that is not trained, no
            dev source gives the metric to go by, or a source is smaller than one global batch.
    """

    model: Trained  # the base class declares these wider than what it is given below
    train_dataset: MixedDataset
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        config: EmbedderConfig,
        args: TrainingArguments,
        model: EmbeddingModel,
        preprocessor: Preprocessor,
        objective: Objective,
        train: Sequence[Source],
        dev: Sequence[RecordDataset] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        check_sources(train, config, objective, preprocessor.family.media, args.world_size)
        check_dropout(config, model.named_modules(), preprocessor.family)
        args = with_metric(args, config, dev)
        if objective.predicts:
            model.output_embedding = load_output_embedding(
                model.family, model.settings.name_or_path, model.settings.revision, model.dtype
            ).to(model.device)
        whole = Trained(model, objective)
        refuse_idle_rates(config.training.learning_rates, whole.trained_towers(), config.model.freeze)
        self.run_config, self.preprocessor, self.train_sources = config, preprocessor, tuple(train)
        self.benchmark = None if config.evaluation is None else Benchmark(config.evaluation, Path(output_folder(args)))
        self.dev_sets = [build_dev_set(data, source) for data, source in zip(dev, config.data.dev, strict=True)]
        self.teacher = teacher_of(model, objective)
        self.tally = Tally()
        self.preemption = Preemption()
        self._begun = False
        self._best_step: int | None = None  # whose weights were put back at the end
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        offer_on_cpu(args)
        super().__init__(
            model=whole,
            args=args,
            train_dataset=MixedDataset(train, data_seed(args)),
            eval_dataset=self.dev_sets or (None if self.benchmark is None else ()),
            callbacks=[
                *callbacks,
                *_early_stopping(config),
                *([] if self.teacher is None else [Following(self.teacher)]),
                self.preemption,
                SaveAfterEpochEnd(),
            ],
        )
        self._follow_the_engine()
        self._uncached = self._keep_features()
        self._sources = [{"name": one.name, "rows": one.size, "digest": one.digest()} for one in train]
        graded, apart = graded_sources(train, objective), sources_apart(train)
        self.groups = self._group(graded)
        self.plan = plan_batches(config, train, args, args.world_size, args.process_index, self.groups)
        shared, packed = self._unshared() is None, self._unpacked() is None
        size = self.halving.budget.chunk_tokens
        predicted = predicted_roles(train, objective)
        positives_only = sources_of_positives(train, objective)
        self.collator = build_collator(
            config, preprocessor, args, size, shared, packed, graded, apart, predicted, positives_only
        )
        self.collator.guides = self._guides(objective)
        self.refresh = self._refreshing(graded | positives_only)

    def _follow_the_engine(self) -> None:
        """What the engine decides: the size of chunks, whether each has a picture, what FSDP2 leaves whole."""
        training, objective = self.run_config.training, self.model.objective
        self.engine = engine_of(self.accelerator, self.args)
        if self.engine.sharded:
            refuse_divided(objective)
        if self.engine.sharded and self.model.model.domain_bias is not None:
            raise ConfigError(
                "data.train domain: what conditions routers is not divided among processes; train with DDP, ZeRO-1 or "
                "ZeRO-2, or remove it"
            )
        lockstep = self.engine.lockstep
        # Only one graph is kept in lockstep, and each chunk may gather all weights: few large ones.
        size = training.token_budget if lockstep else chunk_tokens(self.run_config)
        budget = Budget(size, training.chunk_rows, keep_tokens(self.run_config))
        self.halving = Halving(budget, self.args.device, redo=not lockstep, remedy=smaller(self.run_config))
        # Where the vision side's forward or backward is a collective, a rank with images and one without would wait for
        # each other for ever.
        seeing = not self.model.trained_towers().isdisjoint(("vision", "audio", "projector"))
        self.preprocessor.touch_vision = self.args.world_size > 1 and (self.engine.sharded or (lockstep and seeing))
        if self.is_fsdp_enabled:
            objective.to(self.args.device)
            self.accelerator.state.fsdp_plugin.ignored_modules = [objective]

    def _group(self, graded: frozenset[str]) -> list[Groups | None] | None:
        """What `data.batch_order` keeps together, by the model as it is or another one; None without it."""
        config, device = self.run_config, self.args.device
        if config.data.batch_order is None:
            return None
        budget, half = self.halving.budget.chunk_tokens, torch.bfloat16 if self.args.bf16 else None
        of, name = (config, self.train_sources, graded, data_seed(self.args)), order_model(config)
        if name is not None:
            return group_sources(*of, other_embedder(name, device, self.preprocessor.media, budget, half))
        model = self.model.model
        before, was_training = model.device, model.training
        model.to(device).eval()
        found = group_sources(*of, encoder_of(model, self.preprocessor, device, budget, half))
        model.to(before).train(was_training)
        return found

    def _guides(self, objective: Objective) -> dict[str, GuideVectors]:
        """By source, the vectors of the objective's guide, where that is another embedder."""
        name = guide_of(objective)
        if name is None:
            return {}
        budget, half = self.halving.budget.chunk_tokens, torch.bfloat16 if self.args.bf16 else None
        encoder = other_embedder(name, self.args.device, self.preprocessor.media, budget, half)
        return dict(guide_vectors(self.train_sources, objective, encoder))

    def _refreshing(self, apart: frozenset[str]) -> Refresh | None:
        """What mines negatives while training; None without `data.mining`. ConfigError where no source takes any."""
        if self.run_config.data.mining is None:
            return None
        sources = mined_sources(dict(enumerate(self.train_sources)), apart)
        if not sources:
            raise ConfigError("data.mining has no effect: no source's objective compares hard negatives; remove it")
        return Refresh(self.run_config, sources, data_seed(self.args), Path(self.output))

    @property
    def output(self) -> str:
        """The run's folder."""
        return output_folder(self.args)

    def report(self) -> Report:
        """The batch report of the first batch."""
        first = self.collator([self.train_dataset[index] for index in next(iter(self.plan))])
        accumulation = self.args.gradient_accumulation_steps
        report = batch_report(
            self.run_config,
            self.train_sources,
            self.plan,
            first,
            self.model,
            self.model.objective,
            self.preprocessor,
            accumulation,
            self._unshared(),
            self.engine.lockstep,
            self._features_line(),
            optimizer_name(self.run_config, self.args),
        )
        reason = self._unpacked()
        lines = (
            "padding: none is computed, texts are packed" if reason is None else f"padding: computed ({reason})",
            f"processes: {self.args.world_size}, {self.engine}",
            *([] if self.teacher is None else [str(self.teacher)]),
            *([] if self.groups is None else describe(self.run_config, self.train_sources, self.groups)),
            *([] if self.refresh is None else [str(self.refresh)]),
            *([] if self.benchmark is None else [str(self.benchmark)]),
            *(f"guide of {name}: {guide_of(self.model.objective)}" for name in self.collator.guides),
        )
        lower = ", ".join(map(str, self.model.model.lower_layers))
        layers = (f"layers: vectors of {lower}, and of the last of {self.model.model.depth}",) if lower else ()
        return dataclasses.replace(report, lines=(*report.lines, *lines, *layers))

    def _unshared(self) -> str | None:
        """Why prefixes are not shared; None where they are."""
        if self.run_config.training.share_prefix == "off":
            return "training.share_prefix is off"
        return self.model.model.unshared()

    def _unpacked(self) -> str | None:
        """Why texts are computed with their padding; None where not. ConfigError where that was insisted on."""
        kernel = self.run_config.training.attention_kernel
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.model.dtype
        reason = self.model.model.unpacked(kernel, self.args.device, half)
        if reason is None and self.preprocessor.touch_vision and self.preprocessor.family.multimodal:
            reason = "each chunk of texts has a picture with it, for the other processes"
            if kernel == "packed":
                raise ConfigError(f"training.attention_kernel: 'packed' cannot be ({reason}); set it to auto or padded")
        return reason

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **more: Any) -> TrainOutput:
        """The loop, from a checkpoint of `checkpoint_to_resume` or from the start.

        Raises:
            Preempted: SIGTERM or SIGUSR1 came; there is a complete checkpoint of the last step.
            CheckpointError: the data are not those of the checkpoint, or a checkpoint cannot be written or read.
        """
        if resume_from_checkpoint:
            check_same_data(Path(str(resume_from_checkpoint)), self._sources, self.run_config)
            if self.groups is not None:
                self.groups = load_groups(Path(str(resume_from_checkpoint)), self.groups)
                self.plan.cluster(self.groups)
            self.args = copy.copy(self.args)
            self.args.eval_on_start = False  # was done at the start
        self._begun = False
        self._best_step = None
        if self.benchmark is not None:
            self.benchmark.measured.clear()
        try:
            with self.preemption, self.engine.quiet():
                return super().train(resume_from_checkpoint, *rest, **more)
        finally:
            if self.refresh is not None:
                self.refresh.stop()

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """(epoch, batch) to go on at. The base class would train on in an epoch that a finished run stopped in."""
        place = super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return place
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE)))
        control = saved.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        stopped_early = control.get("should_training_stop", False) and saved.global_step < saved.max_steps
        return (epochs, 0) if stopped_early or saved.global_step >= max_steps else place

    def _keep_features(self) -> str | None:
        """Opens the store of image features; returns why there is none. ConfigError where one was insisted on."""
        training = self.run_config.training
        if training.vision_cache == "off":
            return "training.vision_cache is off"
        reason = uncached(self.model.model, training=True)
        if reason is None and self.preprocessor.touch_vision:
            reason = TOUCHED
        if reason is None:
            precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "tf32" if self.args.tf32 else ""
            limit = int(training.vision_cache_gb * 1e9)
            self.preprocessor.features = open_features(
                self.model.model, self.preprocessor, training.vision_cache, limit, precision
            )
        elif training.vision_cache != "auto":
            raise ConfigError(f"training.vision_cache: features of images cannot be kept ({reason}), or remove it")
        return reason

    def _features_line(self) -> str:
        store = self.preprocessor.features
        if store is None:
            return f"image features: not kept ({self._uncached})"
        return f"image features: {len(store):,} in {store.folder}, {store.bytes_used / 1e9:.2f} GB used there"

    # The step ---------------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module) -> None:
        """Before the first step of a loop, when a resumed run knows its log."""
        self._begun = True
        if self.teacher is not None:
            self.teacher.begin()
        self.halving.resume(self.state.log_history)
        if self.run_config.training.worst_batch_first:
            self._rehearse(model)

    def _rehearse(self, model: nn.Module) -> None:
        """The worst batch, forward and backward, without effect on what follows but for a halved budget."""
        training, device = self.run_config.training, self.args.device
        batch, number, seen = worst_batch(
            self.plan,
            lambda draws: self._collated([(draw, self.train_dataset[draw]) for draw in draws]),
            1 + self.run_config.data.train_group_size,
            None if training.worst_batch_first is True else int(training.worst_batch_first),
            device,
        )
        state = RandomState.capture()
        every, _ = optimizer_bytes(optimizer_name(self.run_config, self.args), trained_parameters(model))
        later = every * self.engine.optimizer_share
        stepped = self.optimizer is not None and bool(self.optimizer.state)  # of a resumed run: it is there already
        try:
            held = torch.empty(0 if stepped else int(later), dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MmembedError(
                f"out of memory before step 1: the optimizer's state takes {later / 2**20:,.0f} MB beside the weights. "
                f"{smaller(self.run_config)}"
            ) from None
        # What an engine has taken cannot be dropped: it gets the gradient times 0, which adds nothing, and no step.
        step = functools.partial(self._add_gradient, model, share=0.0, steps=False)
        _, halved = self.halving.run(batch, step, functools.partial(self._forget, model), last=True)
        del held
        self._forget(model)
        state.restore()
        self.tally.forget_rehearsal()
        if halved:
            self.log(self.halving.budget.logged())
        logger.info(
            "the worst of %d batches looked at (number %d of %d, %s padded tokens) fits",
            *(seen, number + 1, len(self.plan), f"{batch.padded_tokens:,}"),
        )

    def training_step(  # type: ignore[override]  # the loop hands on whatever our loader makes
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """One batch: gradients are added to the parameters, and averaged over processes if a step follows."""
        model.train()
        if not self._begun:
            self._begin(model)
        last = self.accelerator.sync_gradients
        step = functools.partial(self._add_gradient, model)
        (loss, metrics), halved = self.halving.run(inputs, step, functools.partial(self._forget, model), last)
        if halved:
            self.log(self.halving.budget.logged())
        if last:
            self.engine.reduce(model, self.model.objective)
            self.model.objective.commit()
            if self._logs_this_step:
                self.tally.health |= self._gradient_health()
            self.engine.step()
        self.tally.add(metrics, inputs.n_queries * self.args.world_size, inputs.tokens * self.args.world_size)
        return loss / self.current_gradient_accumulation_steps

    def _forget(self, model: nn.Module) -> None:
        """Drops the gradients that this optimizer step has added, and what the objective would remember of it."""
        for parameter in model.parameters():
            parameter.grad = None
        self.model.objective.forget()

    def _add_gradient(
        self, model: nn.Module, batch: Batch, share: float = 1.0, steps: bool | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The step of one batch, in its chunks: loss and metrics.

        Args:
            share: the gradient is multiplied by it.
            steps: whether an optimizer step follows; as accumulation has it if None.
        """
        steps = self.accelerator.sync_gradients if steps is None else steps
        with self.engine.accumulating(model):
            return contrastive_step(
                functools.partial(self._encode, model),
                self.model.objective,
                batch,
                self.halving.budget.keep_tokens,
                scale=share * self._loss_scale() / self.current_gradient_accumulation_steps,
                backward=self.engine.backward(model, steps),
                rounds=max(gather_counts(len(batch.chunks), self.args.device)) if self.engine.lockstep else None,
                workers=self._workers(batch),
                guard=self.halving.guard,
                observe=functools.partial(self._observe, batch) if self._monitors else None,
                teacher=None if self.teacher is None else self._taught_by,
                may_overflow=self.args.fp16,
            )

    @contextmanager
    def _taught_by(self) -> Iterator[Encode]:
        """What encodes with the teacher's weights: the model without what an engine put around it."""
        assert self.teacher is not None, "asked for where there is one"
        with self.teacher.in_place():
            yield functools.partial(self._encode, self.model)

    @property
    def _monitors(self) -> bool:
        """Whether the health monitors look at this step's vectors; logits of pairs say nothing to them."""
        return self._logs_this_step and self.run_config.head is None

    @property
    def _logs_this_step(self) -> bool:
        """Whether the step in progress will be logged: only then the health monitors look."""
        step, strategy = self.state.global_step + 1, IntervalStrategy(self.args.logging_strategy)
        if step == 1 and self.args.logging_first_step:
            return True
        an_epoch = -(-len(self.plan) // self.args.gradient_accumulation_steps)
        every = {IntervalStrategy.STEPS: self.state.logging_steps, IntervalStrategy.EPOCH: an_epoch}.get(strategy)
        return every is not None and step % int(every) == 0

    def _observe(self, batch: Batch, view: View, queries: Embeddings, documents: Embeddings) -> None:
        self.tally.health |= look_at(view, queries, documents, batch)

    def _gradient_health(self) -> dict[str, float]:
        """The norms of the parts' gradients, and what they are scaled by in fp16."""
        scale = self.engine.loss_scale()
        norms = gradient_norms(self._parts, scale or 1.0, self.engine.norm)
        return norms if scale is None else norms | {SCALE: scale}

    @functools.cached_property
    def _parts(self) -> dict[str, list[nn.Parameter]]:
        return parts_of(self.model.named_parameters(), self.model.towers(), self.run_config.adapter.type != "none")

    def _workers(self, inputs: Batch) -> Workers | None:
        """Threads that compute chunks beside each other, in the memory of `token_budget`; None where that can not be.

        That is: several threads of one process on a CPU, a narrow model, no random numbers, nothing that hooks into the
        backward pass.
        """
        if self.args.device.type != "cpu" or self.args.world_size > 1 or self.engine.lockstep or self._draws_randomness:
            return None
        if self.model.model.one_at_a_time:
            return None
        if self.run_config.model.gradient_checkpointing or self.model.config.get_text_config().hidden_size > NARROW:
            return None
        largest = max(chunk.padded_tokens for chunk in inputs.chunks)
        keep = self.halving.budget.keep_tokens
        fitting = len(inputs.chunks) if keep is None else max(1, keep // largest)
        count = min(torch.get_num_threads(), len(inputs.chunks), fitting)
        return Workers(count, self._trained) if count > 1 else None

    @functools.cached_property
    def _trained(self) -> list[nn.Parameter]:
        learned = {id(parameter) for parameter in self.model.objective.parameters()}
        return [one for one in self.model.parameters() if one.requires_grad and id(one) not in learned]

    @functools.cached_property
    def _draws_randomness(self) -> bool:
        """Whether the model's forward draws random numbers in training: any rate of dropout above zero."""
        return draws(self.model.named_modules()) is not None

    def _loss_scale(self) -> float:
        """What this step multiplies gradients by; DeepSpeed does that itself."""
        return 1.0 if self.is_deepspeed_enabled else self.engine.loss_scale() or 1.0

    def _encode(self, model: nn.Module, chunk: Chunk) -> Embeddings:
        return model(chunk.inputs(self.preprocessor).to(self.args.device))

    # Data -------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> PlannedLoader:
        """This process's batches; its own generator keeps the global random state out of it. Where negatives are mined,
        the drawn examples: a batch is made of them when its step comes."""
        args, mines = self.args, self.refresh is not None
        return PlannedLoader(
            Drawn(self.train_sources, data_seed(args)) if mines else self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=list if mines else self.collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=functools.partial(
                start_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
            generator=torch.Generator().manual_seed(args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Batch], None]:
        """The next batches; losses are means over queries, so there is no item count."""
        if self.refresh is not None:
            self._refresh_negatives(self.refresh)
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch if isinstance(batch, Batch) else self._collated(batch))
        return batches, None

    def _collated(self, drawn: Sequence[tuple[Draw, Example]]) -> Batch:
        """A batch of drawn examples, with the mined negatives in effect."""
        refresh = self.refresh
        return self.collator([one if refresh is None else refresh.applied(draw, one) for draw, one in drawn])

    def _refresh_negatives(self, refresh: Refresh) -> None:
        """Before the batches of a step: the negatives of that step, and what the next ones need to be mined."""
        step, every = self.state.global_step, refresh.mining.every
        wanted, before = refresh.weights_of(step), refresh.mined
        if before is None or before.step != wanted:
            started = time.perf_counter()
            if wanted == step:
                self._mine(refresh)
            else:
                refresh.wait(wanted)
            seconds = time.perf_counter() - started
            self.tally.leave_out(seconds)
            logs = {"mined_with": float(wanted), "mined_seconds": round(seconds, 2)}
            self.log(logs if before is None else logs | {"mined_overlap": refresh.overlap(before)})
        if not refresh.mining.asynchronous or every is None or step < every:
            return
        last = step // every * every  # whose weights mine for the steps from `last + every` on
        if last + every < self.state.max_steps:
            if last == step:
                self._write_snapshot(refresh.folder(step))
            if self.is_world_process_zero():
                refresh.go_on(last)

    @torch.no_grad()
    def _mine(self, refresh: Refresh) -> None:
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        budget = self.halving.budget.chunk_tokens
        with self.engine.quiet():
            encoder = Encoder(functools.partial(self._encode, model), self.preprocessor, budget, "")
            refresh.mine_now(encoder, self.state.global_step)
        model.train(was_training)

    def _write_snapshot(self, folder: Path) -> None:
        """The weights as they are, for another process: one that mines with them, or scores them."""
        state = self.engine.full_state(self.model, self.model.model.settings.adapter_type == "none")

        def write() -> None:
            with writing(folder, self.output):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                whole = self.model.state_dict() if state is None else state
                self.model.write(folder / MODEL, self.preprocessor, self.run_config.hash(), whole)

        agreed(write)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs.tokens, device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: what a token costs differs by family, and throughput is logged instead."""
        return 0

    # Optimizer --------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """By name, with a learning rate a tower; normalisations, biases and the objective are not decayed."""
        if self.optimizer is None:
            module, training = self.model if model is None else model, self.run_config.training
            towers = self.model.towers()
            groups = parameter_groups(
                module.named_parameters(),
                lambda name: towers[name.removeprefix("module.")],
                {name for name in self.get_decay_parameter_names(module) if not name.startswith("objective.")},
                self.args.learning_rate,
                {str(tower): rate for tower, rate in training.learning_rates.items()},
                self.args.weight_decay,
            )
            self.optimizer = self._optimizer(module, groups)
        return self.optimizer

    def _optimizer(self, module: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.run_config.training.optimizer == "lion":
            given = self.run_config.training.arguments
            betas = (given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.99))
            return Lion(groups, lr=self.args.learning_rate, betas=betas)
        cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, module)  # type: ignore[arg-type]  # any module
        optimizer = cls(groups, **arguments)
        if arguments.get("optim_bits") == 8:
            self._keep_embeddings_in_32_bits(module)
        return optimizer

    @staticmethod
    def _keep_embeddings_in_32_bits(module: nn.Module) -> None:
        """Rows of rare tokens have moments too small for 8 bits (Dettmers et al., arXiv 2110.02861, section 2.3)."""
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        for part in module.modules():
            if isinstance(part, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(part, "weight", {"optim_bits": 32})

    # Logs -------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's metrics (means since the last log, of this process) and the throughput."""
        if "loss" in logs and self.tally.steps:
            logs |= self.tally.take()
        super().log(logs, start_time)
        if "loss" in logs and self.args.should_log:
            for finding in judge(self.state.log_history[-RECENT:]):
                if finding.step == self.state.global_step:
                    logger.warning("step %d: %s", finding.step, finding.message)

    # Evaluation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(  # type: ignore[override]  # the loop passes on the `eval_dataset` that it was given
        self, eval_dataset: Sequence[DevSet] | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Ranks and correlates: `eval_ndcg_at_10`, `eval_{source}_ndcg_at_10`, `eval_spearman`, ...; and scores the
        tasks of the benchmark: `eval_{task}`, `eval_benchmark`.

        Args:
            eval_dataset: of `build_dev_set`; the run's dev sources and its benchmark if None.
            ignore_keys: of the base class; a model has no outputs to leave out here.
        """
        started = time.perf_counter()
        found = self._dev_metrics(self.dev_sets if eval_dataset is None else eval_dataset)
        if eval_dataset is None and self.benchmark is not None:
            found |= self._benchmark_metrics(self.benchmark)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_seconds"] = round(time.perf_counter() - started, 2)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.tally.leave_out(time.perf_counter() - started)
        return metrics

    def _dev_metrics(self, dev_sets: Sequence[DevSet]) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        objective: Objective = self.model.objective
        encode = functools.partial(self._encode, model)
        budget = self.halving.budget.chunk_tokens
        share = self.collator.share_prefix
        packed = self.collator.packed
        with self.engine.quiet():
            found = evaluate(
                dev_sets,
                encode,
                lambda dev: objective.part_for(dev.name, dev.task, or_first=True).similarity_of,
                self.preprocessor,
                budget,
                share,
                packed,
            )
        model.train(was_training)
        return found

    def _benchmark_metrics(self, benchmark: Benchmark) -> dict[str, float]:
        """Scores of the weights as they are; those of a step that was scored before are not scored again."""
        step = self.state.global_step if self._best_step is None else self._best_step
        if step not in benchmark.measured:
            self._write_snapshot(benchmark.folder(step))
            benchmark.score(step)
        return dict(benchmark.measured[step])

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Weights, optimizer, random states, and last the trainer's state, without which a checkpoint does not count.
        Older checkpoints are removed once all of that is on the disk: a power failure leaves one.

        Raises:
            CheckpointError: it could not be written whole; what was written of it is gone, the one before is not. Or
                what comes after it failed (older ones are removed): then it is complete and stays.
        """
        folder = Path(self.output, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)  # of an earlier run
        args, self.args = self.args, copy.copy(self.args)
        self.args.save_total_limit = None
        if self.preemption.stopping:  # a stop is there to go on from
            self.args.save_only_model = False
        try:
            with writing(folder, self.output):
                super()._save_checkpoint(model, trial)
                if args.should_save:
                    to_disk(folder)
                    rotate_checkpoints(
                        self.output, args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
                    )
        except CheckpointError:
            if not (folder / STATE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args = args
        self._write_report()

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process keeps for itself: random states, and its sums since the last log."""
        from safetensors.torch import save_file

        super()._save_rng_state(output_dir)
        counted = torch.tensor([self.tally.steps, self._globalstep_last_logged])
        tensors = {"loss": self._tr_loss, "counted": counted, **self.tally.tensors()}
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            Path(output_dir, SUMS.format(self.args.process_index)),
        )
        self.accelerator.wait_for_everyone()  # the state comes next, and says that all of it is there
        if self.args.should_save:
            to_disk(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states and sums as they were. Other processes than those that saved them draw new random numbers."""
        if checkpoint is None:
            return
        processes = read_run(Path(checkpoint))["world_size"]
        if processes == self.args.world_size:
            super()._load_rng_state(checkpoint)
            files = [SUMS.format(self.args.process_index)]
        else:
            seed = np.random.SeedSequence([self.args.seed, self.state.global_step, self.args.process_index])
            set_seed(int(seed.generate_state(1)[0]))
            files = [SUMS.format(index) for index in range(processes)]
            logger.warning(
                "%s: was written by %d processes, now there are %d: batches, weights, optimizer and schedule go on as "
                "they were, dropout draws other numbers",
                checkpoint,
                processes,
                self.args.world_size,
            )
        self._restore_sums([read_tensors(Path(checkpoint, file)) for file in files])

    def _restore_sums(self, saved: Sequence[dict[str, Tensor]]) -> None:
        """Means over the processes that saved them."""
        self._tr_loss += torch.stack([one["loss"] for one in saved]).mean().to(self._tr_loss.device)
        steps, self._globalstep_last_logged = saved[0]["counted"].tolist()
        self.tally.restore(saved, steps, self.args.device)

    def save_state(self) -> None:
        """Writes the log and position of the run into the output folder."""
        with writing(Path(self.output, STATE), self.output):
            super().save_state()
            self._write_report()

    def _write_report(self) -> None:
        """The page of the run so far: a view of the log, which is no reason to end a run."""
        if not self.args.should_save:
            return
        try:
            write_report(self.output, self.state.log_history)
        except OSError as error:
            logger.warning(
                "the report of %s could not be written (%s); its log is in the checkpoints", self.output, error
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the embedder, by default into the output folder. Raises CheckpointError; what lay there stays."""
        folder = Path(output_dir or self.output)
        with nullcontext() if _internal_call else writing(folder, self.output):
            self._save(
                str(folder), self.engine.full_state(self.model, self.model.model.settings.adapter_type == "none")
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes a self-describing embedder, and the objective's learned parameters beside it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output)
        state = self.model.state_dict() if state_dict is None else state_dict
        self.model.write(folder, self.preprocessor, self.run_config.hash(), state)
        described = {**describe_run(self.run_config, self.args), "sources": self._sources}
        (folder / RUN).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Divided optimizers write a part a process, DeepSpeed also the trained weights: its loader wants them. A
        teacher is the same in every process."""
        if self.teacher is not None and self.args.should_save:
            self.teacher.save(Path(output_dir))
        if self.groups is not None and self.args.should_save:
            save_groups(Path(output_dir), self.groups)
        if self.refresh is not None and self.args.should_save:
            self.refresh.save(Path(output_dir))
        if self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped.engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            assert self.lr_scheduler is not None, "training made it"
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Puts a checkpoint's weights into the model before FSDP2 divides it, and into DeepSpeed's engine once it is
        there."""
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:
            self.model.restore(Path(resume_from_checkpoint))
        into_engine = resume_from_checkpoint if self.is_deepspeed_enabled else None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if into_engine else resume_from_checkpoint
        )
        self.engine.prepared(self.model.objective)
        if into_engine is not None:
            self._load_into_engine(into_engine)
            self._load_optimizer_and_scheduler(into_engine)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.teacher is not None:
            self.teacher.load(Path(checkpoint))
        if checkpoint is not None and self.refresh is not None:
            self.refresh.mined = self.refresh.read(Path(checkpoint))

    def _load_into_engine(self, folder: str) -> None:
        check_same_settings(folder, self.model.model)
        deepspeed_load_checkpoint(self.model_wrapped, folder, load_module_strict=False)  # frozen weights are not in it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # there it happened before the model was divided
            self.model.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None, "the loop asks only where there is one"
        logger.info("loading the best checkpoint %s (%s)", best, self.state.best_metric)
        if self.is_deepspeed_enabled:
            self._load_into_engine(best)
        elif self.is_fsdp_enabled:
            self.model.distribute(Path(best), self.accelerator.is_main_process)
        else:
            self.model.restore(Path(best))
        self._best_step = self.state.best_global_step

    def verify(self) -> float | None:
        """Reads the saved embedder again on the main process and compares vectors, see `verify_checkpoint`; None on the
        others, which are needed where the model is divided."""
        model = self.model.model
        ours = vectors_of(model, self.preprocessor, self.model) if self.engine.sharded else None
        unset_hf_deepspeed_config()  # the copy is whole
        return (
            verify_checkpoint(self.output, model, self.preprocessor, vectors=ours, dtype=self.engine.computes_in())
            if self.is_world_process_zero()
            else None
        )


def _early_stopping(config: EmbedderConfig) -> list[TrainerCallback]:
    patience = config.training.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience, config.training.early_stopping_threshold)]
