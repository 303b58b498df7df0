"""The `training` block of `train_generative_reranker` -> trl's config, and the checkpoint that a run goes on from."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from mmembed.config.arguments import wrong_values
from mmembed.config.generative import GenerativeConfig
from mmembed.errors import ConfigError, nearest

RUN = "generative_run.json"  # which config the checkpoints of a folder are of
DECIDED = {
    **dict.fromkeys(
        ("max_length", "truncation_mode"),
        "a conversation that is cut loses its answer; lengths and answer.documents bound it",
    ),
    **dict.fromkeys(
        (
            "dataset_text_field",
            "dataset_kwargs",
            "completion_only_loss",
            "assistant_only_loss",
            "remove_unused_columns",
        ),
        "conversations are made from the records, and the answer alone is learned",
    ),
    **dict.fromkeys(
        ("chat_template_path", "eos_token", "pad_token"), "the processor is that of the model, and answers with it"
    ),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the blocks model and adapter say how it is loaded"),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "eval_steps", "load_best_model_at_end"),
        "there is no dev data; rank with the result",
    ),
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing"), "it cuts conversations at max_length"),
    "resume_from_checkpoint": "the same command goes on from the last checkpoint of output_dir",
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "upload the finished folder yourself"),
}


LOSSES = {  # of trl 1.16, which looks at the name when weights are loaded, or in the first step
    "sft": ("nll", "dft", "chunked_nll"),
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
}


def training_arguments(config: GenerativeConfig) -> Any:
    """trl's config. Raises ConfigError where trl is not installed, a name is unknown or decided here, or a value is
    refused."""
    import mmembed.backbones  # noqa: F401  declares the operators that torchvision misses, before trl imports it

    try:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise ConfigError(f"answers in words are trained with trl ({error}): pip install 'mmembed[train]'") from error
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from mmembed.training.preflight import check_scheduler, check_tracker

    kind: Any = DPOConfig if config.method.type == "dpo" else SFTConfig
    names = {field.name for field in dataclasses.fields(kind)}
    given = dict(config.training.arguments)
    for key in given:
        if key in DECIDED:
            raise ConfigError(f"training.{key}: has no effect here: {DECIDED[key]}")
        if key not in names:
            raise ConfigError(f"training: unknown key '{key}'; {nearest(key, names - DECIDED.keys())}")
        if given[key] is False and key.endswith("_strategy"):
            given[key] = "no"  # an unquoted `no` is a boolean in YAML
    for wrong in wrong_values(given):
        raise ConfigError(wrong)
    if float(given.get("beta", 1)) <= 0:
        raise ConfigError(f"training.beta: found {given['beta']}; give a number above 0, or wrong orders are preferred")
    check_scheduler(given)
    if given.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("training.use_liger_kernel: needs liger-kernel, which is not installed; install or remove it")
    trackers = given.get("report_to", "none")
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        check_tracker(tracker)
    if not torch.cuda.is_available():
        if given.get("fp16"):
            raise ConfigError("training.fp16: half precision on a CPU loses gradients; use training.bf16")
        on_mps = torch.backends.mps.is_available()
        given = {"use_cpu": not on_mps, "bf16": False, "dataloader_pin_memory": False, **given}
    try:
        args = kind(**{"report_to": "none", "max_length": None, **given})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}") from error
    unset_hf_deepspeed_config()  # otherwise what is loaded from here on would be divided at once, outlines too
    losses = args.loss_type if config.method.type == "dpo" else [args.loss_type]
    for loss in losses:
        if loss not in LOSSES[config.method.type]:
            raise ConfigError(
                f"training.loss_type: there is no '{loss}'; {nearest(str(loss), LOSSES[config.method.type])}"
            )
    return args


def last_checkpoint(config: GenerativeConfig) -> str | None:
    """The checkpoint that the run goes on from. Raises ConfigError where the folder holds those of another config."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(config.training.output_dir)
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    file = folder / RUN
    if found is not None and (not file.is_file() or json.loads(file.read_text())["config"] != config.hash()):
        raise ConfigError(
            f"training.output_dir: {folder} holds checkpoints of a run with another model, answer, method, adapter or "
            "data; name another folder, or remove them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"config": config.hash()}) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"training.output_dir: {folder} cannot be written ({error}); name another folder") from error
    return found
