"""A config's `training` block -> transformers.TrainingArguments: the user's keys, and defaults that suit embedders."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from mmembed.config.blocks import EmbedderConfig
from mmembed.data.dataset import RecordDataset
from mmembed.errors import ConfigError, nearest
from mmembed.training.benchmark import MEAN, benchmark_metrics
from mmembed.training.evaluation import metric_names
from mmembed.training.launch import check_launched, launched_with, reach_first_process
from mmembed.training.optimizers import OPTIM_NAMES

logger = logging.getLogger(__name__)
__all__ = ["set_seed", "training_arguments"]
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "report_to": "none",  # trackers are asked for by name: tensorboard, wandb
    "logging_steps": 10,
    "logging_first_step": True,
    "save_total_limit": 3,
    "warmup_steps": 0.05,  # below 1 it is a share of all steps
    "restore_callback_states_from_checkpoint": True,  # or early stopping would forget what it counted
    "ddp_broadcast_buffers": False,  # constants; a forward pass must hold no collective (out_of_memory)
}

WAIT = 300  # seconds for the first process; hosts of a cluster do not start at once
_CHOICES: dict[str, type[Enum]] = {
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "logging_strategy": IntervalStrategy,
    "eval_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
}


def training_arguments(config: EmbedderConfig) -> TrainingArguments:
    """Builds the arguments. Raises ConfigError where transformers refuses a value."""
    chosen = {**DEFAULTS, **config.training.arguments}
    for key, value in chosen.items():
        if value is False and key.endswith("_strategy"):
            chosen[key] = "no"  # an unquoted `no` is a boolean in YAML
    if config.training.optimizer != "lion" and "optim" not in chosen:
        chosen["optim"] = OPTIM_NAMES[config.training.optimizer or "adamw"]
    if not torch.cuda.is_available():
        chosen.setdefault("use_cpu", not torch.backends.mps.is_available())
        chosen.setdefault("dataloader_pin_memory", False)
    if _looks_for_the_best(config, chosen):
        chosen.setdefault("metric_for_best_model", "eval_ndcg_at_10")  # with_metric looks at the data
        chosen.setdefault("greater_is_better", True)  # of all dev metrics
    if chosen.get("fp16") and chosen.get("use_cpu"):
        raise ConfigError("training.fp16: half precision on a CPU loses gradients; use training.bf16")
    chosen = launched_with(config, chosen)
    for key, kind in _CHOICES.items():
        values = [choice.value for choice in kind]
        if key in chosen and chosen[key] not in values:
            raise ConfigError(f"training.{key}: there is no '{chosen[key]}'; {nearest(chosen[key], values)}")
    reach_first_process(float(chosen.get("ddp_timeout", WAIT)))
    try:
        args = TrainingArguments(remove_unused_columns=False, label_names=[], **chosen)
    except torch.distributed.DistError as error:
        raise ConfigError(
            f"not all {os.environ.get('WORLD_SIZE')} processes met at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} (MASTER_ADDR and MASTER_PORT, which the launcher sets): {error}"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}") from error
    check_launched(args, config)
    one_device(args)
    return args


def one_device(args: TrainingArguments) -> None:
    """Keeps a single process on its first device: transformers would divide its batches over all with DataParallel,
    which knows no contrastive step."""
    if args.n_gpu > 1:
        logger.warning(
            "%d devices are visible to one process, which trains on %s alone; start one process a device "
            "(accelerate launch, torchrun) to use them all",
            *(args.n_gpu, args.device),
        )
        args._n_gpu = 1


def with_metric(args: TrainingArguments, config: EmbedderConfig, dev: Sequence[RecordDataset]) -> TrainingArguments:
    """The arguments with the metric that tells the best checkpoint: as given, else by what the dev sources hold, else
    the mean of the benchmark's tasks. All processes have to call it.

    Raises:
        ConfigError: evaluation gives no metric of that name.
    """
    if args.metric_for_best_model is None:
        return args
    names = metric_names({dataset.name: dataset.tasks for dataset in dev}) + benchmark_metrics(config.evaluation)
    default = next((name for name in ("ndcg_at_10", "spearman", MEAN) if name in names), "ndcg_at_10")
    metric = str(config.training.arguments.get("metric_for_best_model", default)).removeprefix("eval_")
    if metric not in names:
        who = "dev evaluation" if config.evaluation is None else "evaluation"
        raise ConfigError(f"training.metric_for_best_model: {who} gives no '{metric}'; {nearest(metric, names)}")
    args = copy.copy(args)
    args.metric_for_best_model = f"eval_{metric}"
    return args


def output_folder(args: TrainingArguments) -> str:
    """Where a run writes; transformers declares it optional."""
    assert args.output_dir is not None, "TrainingArguments gives it a default"
    return args.output_dir


def _looks_for_the_best(config: EmbedderConfig, chosen: Mapping[str, Any]) -> bool:
    return (
        config.training.early_stopping_patience is not None
        or bool(chosen.get("load_best_model_at_end"))
        or chosen.get("save_strategy") == "best"
        or chosen.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )
