"""The names of transformers.TrainingArguments, and why some of them have no effect on an embedder."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from mmembed.errors import ConfigError


@cache
def training_argument_names() -> frozenset[str]:
    """The fields of transformers.TrainingArguments, read from its source: importing it would load torch (3 s)."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("training needs transformers; install it with: pip install 'mmembed[train]'")
    module = ast.parse((Path(spec.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8"))
    owner = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [node.target for node in owner.body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


_NO_FSDP = (
    "processes hold the whole model (DDP); training.deepspeed with recipes/deepspeed/zero1.json or zero2.json shards "
    "optimizer state and gradients, and parameters are not sharded in this version"
)
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
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
    "parallelism_config": "tensor and context parallelism are not offered",
    "ddp_find_unused_parameters": "gradients are reduced once a step, unused parameters included",
    "ddp_bucket_cap_mb": "gradients are reduced once a step",
    "ddp_static_graph": "gradients are reduced once a step",
    "debug": "use torch's own tools",
    "local_rank": "the launcher sets it",
    "accelerator_config": "batches are planned for each process before they are loaded",
    "bf16_full_eval": "dev evaluation runs in the precision of training",
    "fp16_full_eval": "dev evaluation runs in the precision of training",
    "torch_empty_cache_steps": "memory is bounded by training.token_budget",
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
        "nothing is uploaded from training; upload the finished folder yourself",
    ),
}
