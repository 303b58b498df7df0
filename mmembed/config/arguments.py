"""The names and types of transformers.TrainingArguments, and why some of them have no effect on an embedder."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmembed.errors import ConfigError


def training_argument_names() -> frozenset[str]:
    """The fields of transformers.TrainingArguments."""
    return frozenset(_annotations())


def wrong_values(arguments: Mapping[str, Any]) -> list[str]:
    """A message for each value that is not of its argument's type or range. Unknown names are passed over."""
    return [
        f"training.{key}: found {value!r}; {wrong}" for key, value in arguments.items() if (wrong := _wrong(key, value))
    ]


_ANY_RANGE = (float("-inf"), True, float("inf"))  # smallest, whether it is allowed itself, and what stays above
_ABOVE_ZERO, _FROM_ZERO = (0.0, False, float("inf")), (0.0, True, float("inf"))
_RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"), _ABOVE_ZERO),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "logging_steps", "save_steps", "eval_steps"), _ABOVE_ZERO),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "ddp_timeout"), _ABOVE_ZERO),
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "eval_delay"), _FROM_ZERO),
    **dict.fromkeys(("dataloader_num_workers", "seed", "data_seed"), _FROM_ZERO),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0.0, True, 1.0)),
}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping", "list": "a list"}
_MORE = {"resume_from_checkpoint": "str | bool | None", "fsdp": "str | bool | None"}  # true: the last one; on


class _Types(dict[str, Any]):
    """What the names in an annotation mean; transformers' enumerations are given as strings."""

    def __missing__(self, name: str) -> Any:
        return str


_TYPES = _Types(int=int, float=float, bool=bool, str=str, dict=dict, list=list, Any=Any, Literal=Literal)


def _wrong(key: str, value: Any) -> str:
    """What would be right, or an empty string."""
    annotation = _MORE.get(key, _annotations().get(key))
    if annotation is None or (value is False and key.endswith("_strategy")):  # an unquoted `no` is a boolean in YAML
        return ""
    try:
        _adapter(annotation).validate_python(value)
    except ValidationError:
        names = [node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)]
        words = dict.fromkeys(_WORDS.get(name, "a string") for name in names if name not in ("Any", "Literal"))
        return f"give {' or '.join(words)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if key == "max_steps":
        return "" if value == -1 or value > 0 else "give 1 or more, or -1 for num_train_epochs"
    low, allowed, high = _RANGES.get(key, _ANY_RANGE)
    if value > low or (allowed and value == low):
        return "" if value < high else f"give a number below {high:g}"
    return f"give {low:g} or more" if allowed else f"give a number above {low:g}"


@cache
def _adapter(annotation: str) -> TypeAdapter[Any]:
    settings = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(eval(annotation, {"__builtins__": {}}, _TYPES), config=settings)


@cache
def _annotations() -> dict[str, str]:
    """Field -> type of transformers.TrainingArguments, read from its source: importing it would load torch (3 s)."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("training needs transformers; install it with: pip install 'mmembed[train]'")
    module = ast.parse((Path(spec.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8"))
    owner = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field.target, ast.Name)}


UNUSABLE_ARGUMENTS = {
    "auto_find_batch_size": "memory is bounded by training.token_budget, the batch stays as asked",
    "label_smoothing_factor": "it belongs to classification losses",
    "prediction_loss_only": "dev evaluation ranks, it has no loss",
    "include_for_metrics": "dev evaluation ranks; its metrics are fixed",
    "batch_eval_metrics": "dev evaluation ranks; its metrics are fixed",
    "eval_accumulation_steps": "dev vectors are kept on the CPU",
    "eval_do_concat_batches": "dev evaluation has its own batches",
    "eval_use_gather_object": "dev evaluation gathers vectors itself",
    "per_device_eval_batch_size": "dev batches are bounded by training.token_budget",
    "label_names": "batches carry their labels",
    "remove_unused_columns": "records are not tables of model inputs",
    "train_sampling_strategy": "batches are planned by source; set data.mixing_alpha or source weights",
    "length_column_name": "chunks are sorted by length always",
    "dataloader_drop_last": "batches are always full",
    "neftune_noise_alpha": "noise on input embeddings is not offered",
    "use_liger_kernel": "its kernels patch language-modelling heads, an embedder has none",
    "liger_kernel_config": "its kernels patch language-modelling heads, an embedder has none",
    "use_cache": "no generation happens in training",
    "gradient_checkpointing_kwargs": "checkpointing is non-reentrant; set model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "checkpointing is non-reentrant; set model.gradient_checkpointing",
    "optim_target_modules": "choose what is trained with adapter.target_modules and model.freeze",
    "average_tokens_across_devices": "the loss is a mean over queries",
    "do_train": "the recipe trains and evaluates on dev",
    "do_eval": "set training.eval_strategy",
    "do_predict": "use python -m eval.run",
    "parallelism_config": "tensor and context parallelism are not offered",
    "ddp_find_unused_parameters": "gradients are reduced once a step, unused parameters included",
    "ddp_bucket_cap_mb": "gradients are reduced once a step",
    "ddp_broadcast_buffers": "buffers of these models are constants, the same in all processes",
    "ddp_static_graph": "gradients are reduced once a step",
    "debug": "transformers' hooks fail on boolean masks; losses and gradients that are not finite are warned of",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always write a checkpoint first",
    "ignore_data_skip": "a resumed run goes on at its place in the data",
    "local_rank": "the launcher sets it",
    "accelerator_config": "batches are planned for each process before they are loaded",
    "bf16_full_eval": "dev evaluation runs in the precision of training",
    "fp16_full_eval": "dev evaluation runs in the precision of training",
    "torch_empty_cache_steps": "the step is mmembed's own, its memory is bounded by training.token_budget",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "transformers would upload its own files, without mmembed.json and the pooling's weights; upload the finished "
        "folder yourself",
    ),
}
