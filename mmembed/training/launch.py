"""Which strategy a run was launched with: `accelerate launch`'s choice and the config's, as keys of TrainingArguments.

`accelerate launch` hands its YAML over in environment variables. They are turned into the same keys that a config can
set (`deepspeed`, `fsdp`, `fsdp_config`), so there is one path behind both, and what contradicts is refused here, before
data or weights are read. Weights are always loaded whole by each process and divided afterwards (docs/decisions.md).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mmembed.config.blocks import EmbedderConfig
from mmembed.errors import ConfigError, nearest
from mmembed.objectives import build_objective
from mmembed.training.teacher import refuse_divided

AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}  # what a DeepSpeed file leaves out is what the config says, not DeepSpeed's default
OF_FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": None,
    "min_num_params": 0,
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
}
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")  # of FSDP2's optimizer
_NOT_OF_FSDP = {
    "activation_checkpointing": "set model.gradient_checkpointing",
    "cpu_offload": "weights stay on the device; ZeRO-3 offloads (zero_optimization.offload_param in its JSON file)",
    "offload_params": "weights stay on the device; ZeRO-3 offloads (zero_optimization.offload_param in its JSON file)",
    "ignored_modules": "what is not sharded is decided here: the objective's parameters",
}
WHOLE_MATRICES = {
    "adafactor": "its moments are row and column means of whole matrices",
    "adamw_8bit": "it keeps moments of token tables in 32 bits, and shards no longer tell what they belong to",
}


def launched_with(config: EmbedderConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the strategy that the launcher asks for.

    Raises:
        ConfigError: launcher and config name two strategies, one has a setting that is not offered, or what the config
            asks for cannot be done with it.
    """
    arguments = dict(chosen)
    by_launcher = {name for name in ("deepspeed", "fsdp") if _is_true(f"ACCELERATE_USE_{name.upper()}")}
    by_config = {name for name in ("deepspeed", "fsdp") if arguments.get(name)}
    if len(by_launcher | by_config) > 1:
        raise ConfigError("deepspeed and fsdp are both asked for (accelerate's YAML, training.*); keep one")
    if by_launcher & by_config:
        (name,) = by_config
        raise ConfigError(f"training.{name}: accelerate's YAML sets it too; keep one of the two")
    _same_precision(arguments)
    if by_launcher | by_config == {"deepspeed"}:
        arguments["deepspeed"] = _deepspeed(arguments.get("deepspeed"))
    elif by_launcher | by_config == {"fsdp"}:
        given = _of_environment() if by_launcher else _of_config(arguments)
        arguments |= {"fsdp": True, "fsdp_config": _fsdp(given)}
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # the launcher's default; transformers would obey it
    elif arguments.get("fsdp_config") is not None:
        raise ConfigError("training.fsdp_config has no effect without training.fsdp: true")
    if arguments.get("fsdp") and arguments.get("optim") == "sgd":
        raise ConfigError("training.optim 'sgd': FSDP2 cannot resume an optimizer without a state; use adamw")
    _check_strategy(config, arguments)
    optimizer = config.training.optimizer
    if by_launcher | by_config and optimizer in WHOLE_MATRICES:
        raise ConfigError(
            f"training.optimizer '{optimizer}': {WHOLE_MATRICES[optimizer]}; use adamw or lion with DeepSpeed and "
            "FSDP, or launch with recipes/accelerate/ddp.yaml"
        )
    return arguments


def divides_weights(arguments: Mapping[str, Any]) -> bool:
    """Whether a config's own strategy divides the weights (ZeRO-3, FSDP2): then every forward pass is a collective.

    Raises:
        ConfigError: the DeepSpeed file cannot be read.
    """
    given = arguments.get("deepspeed")
    stage = 0 if not given else _deepspeed(given)["zero_optimization"].get("stage", 0)
    return bool(arguments.get("fsdp")) or stage == 3


def reach_first_process(wait: float) -> None:
    """Waits until the first process can be reached, which every other one has to do before it can do anything.

    torch does so too, for half an hour, and then does not say what the address came from.

    Args:
        wait: seconds.

    Raises:
        ConfigError: with the address, and where it is set.
    """
    if os.environ.get("RANK", "0") == "0":
        return
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return  # no launcher's variables: torch says which one is missing
    deadline = time.monotonic() + wait
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(1.0, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"process {os.environ['RANK']}: cannot reach the first process at {host}:{port} within {wait:g} s "
                    f"({error}). The address is MASTER_ADDR and MASTER_PORT, which the launcher sets (accelerate: "
                    "--main_process_ip, --main_process_port; torchrun: --master_addr, --master_port): check that the "
                    "first process was started and that this host may connect to it; training.ddp_timeout waits longer"
                ) from None
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def check_launched(args: TrainingArguments, config: EmbedderConfig) -> None:
    """Refuses what only shows once the arguments are built.

    Raises:
        ConfigError: the DeepSpeed file contradicts the config, or what was asked for needs several processes.
    """
    if args.deepspeed_plugin is not None:
        found = args.deepspeed_plugin.hf_ds_config
        for mismatch in found.mismatches:
            theirs, ours = mismatch.removeprefix("- ds ").split(" vs hf ")
            raise ConfigError(
                f'training.deepspeed: {theirs} contradicts training.{ours}; write "auto" in DeepSpeed\'s file, which '
                "takes over the config's value, or make them equal"
            )
        unset_hf_deepspeed_config()  # otherwise every model that is loaded from here on would be divided at once
    if args.fsdp and args.world_size == 1:
        raise ConfigError(
            "training.fsdp: there is one process and nothing to share; launch several (accelerate launch "
            "--config_file recipes/accelerate/fsdp2.yaml), or remove it"
        )


def check_inherited(args: TrainingArguments, config: EmbedderConfig) -> None:
    """Refuses what the arguments' config did not say: the adapter of a second stage (`inherit_settings`).

    Raises:
        ConfigError: with what to use instead.
    """
    if args.deepspeed_plugin is not None:
        _refuse_four_bits(config, args.deepspeed_plugin.zero_stage)


def _refuse_four_bits(config: EmbedderConfig, stage: int | None) -> None:
    if config.adapter.type == "qlora" and stage == 3:
        raise ConfigError(
            "adapter.type 'qlora' + ZeRO-3: bitsandbytes keeps a gathered 4-bit weight until its backward pass, so "
            "dividing saves little; they are small, so use recipes/accelerate/zero2.yaml or ddp.yaml, or lora with "
            "ZeRO-3"
        )


def _check_strategy(config: EmbedderConfig, arguments: Mapping[str, Any]) -> None:
    """Refuses what the strategy of complete arguments cannot do. Raises ConfigError."""
    deepspeed, fsdp = arguments.get("deepspeed") or {}, arguments.get("fsdp")
    if not deepspeed and not fsdp:
        return
    for block, key in (("optimizer", "training.optimizer"), ("scheduler", "training.lr_scheduler_type")):
        if block in deepspeed:
            raise ConfigError(
                f"training.deepspeed: the block '{block}' would replace {key}, which knows a rate for each tower; "
                f"remove the block and set {key}"
            )
    stage = deepspeed["zero_optimization"].get("stage") if deepspeed else None
    _refuse_four_bits(config, stage)
    if config.training.grad_cache is False:
        raise ConfigError(
            "training.grad_cache: false keeps the graphs of all chunks, which DeepSpeed and FSDP cannot; write auto (a "
            "batch that fits training.token_budget is one chunk and is encoded once)"
        )
    if arguments.get("load_best_model_at_end") and arguments.get("save_only_model"):
        raise ConfigError(
            "training.save_only_model with load_best_model_at_end: DeepSpeed and FSDP load the best checkpoint with "
            "its optimizer state; set one of the two to false"
        )
    form = arguments["fsdp_config"]["state_dict_type"] if fsdp else None
    if arguments.get("save_only_model") and form == "SHARDED_STATE_DICT":
        raise ConfigError(
            f"training.save_only_model with fsdp_config.state_dict_type '{form}': that is how the optimizer's state is "
            "written, and there is none; leave state_dict_type out"
        )
    if stage == 3 or fsdp:
        refuse_divided(build_objective(config.objective))


def _same_precision(arguments: Mapping[str, Any]) -> None:
    """Half precision is the config's business; a YAML of accelerate that says otherwise would be passed over."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher in ("bf16", "fp16") and not arguments.get(launcher):
        raise ConfigError(
            f"training.{launcher}: false, but accelerate's mixed_precision is '{launcher}'; set training.{launcher}: "
            'true, or mixed_precision: "no"'
        )


def _deepspeed(given: Any) -> dict[str, Any]:
    """The DeepSpeed config of a file, a mapping, or the launcher's environment."""
    if given is None:
        from accelerate.utils import DeepSpeedPlugin

        named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        given = named if named != "none" else DeepSpeedPlugin().deepspeed_config
    if not isinstance(given, Mapping):
        given = _read_object(given, "training.deepspeed", "recipes/deepspeed/zero2.json")
    if not isinstance(given.get("zero_optimization"), Mapping):
        raise ConfigError('training.deepspeed: the file has no zero_optimization; give {"stage": 1}, 2 or 3')
    return AUTO | dict(given)


def _read_object(file: Any, key: str, example: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ConfigError with the file, and the line where it is broken."""
    path = Path(str(file))
    if not path.is_file():
        raise ConfigError(
            f"{key}: there is no file '{path}' (from {Path.cwd()}); give a path to a JSON file, for example {example}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{key}: {path}:{error.lineno}: no JSON from column {error.colno} on ({error.msg}); correct that line "
            "(JSON has no comments, no comma behind the last entry, and double quotes)"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path}: not written in UTF-8 ({error.reason}); save it as UTF-8") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path}: holds a {type(found).__name__}; give an object, for example {example}")
    return found


def _of_environment() -> dict[str, Any]:
    """The launcher's FSDP settings under the names of `fsdp_config`; what has the launcher's default is left out."""
    names = {
        "version": "VERSION",
        "auto_wrap_policy": "AUTO_WRAP_POLICY",
        "transformer_layer_cls_to_wrap": "TRANSFORMER_CLS_TO_WRAP",
        "min_num_params": "MIN_NUM_PARAMS",
        "reshard_after_forward": "RESHARD_AFTER_FORWARD",
        "state_dict_type": "STATE_DICT_TYPE",
        "activation_checkpointing": "ACTIVATION_CHECKPOINTING",
        "offload_params": "OFFLOAD_PARAMS",
        "ignored_modules": "IGNORED_MODULES",
    }
    found = {key: os.environ.get(f"FSDP_{name}") for key, name in names.items()}
    off = {"activation_checkpointing": "false", "offload_params": "false"}
    return {key: value for key, value in found.items() if value is not None and value != off.get(key)}


def _of_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = arguments.get("fsdp_config") or {}
    if not isinstance(given, Mapping):
        given = _read_object(given, "training.fsdp_config", '{"reshard_after_forward": true}, or the mapping itself')
    if arguments["fsdp"] not in (True, "full_shard", "full_shard auto_wrap"):
        raise ConfigError(
            f"training.fsdp: found {arguments['fsdp']!r}; write true, and settings in training.fsdp_config"
        )
    return {key.removeprefix("fsdp_"): value for key, value in given.items()}


def _fsdp(given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key in _NOT_OF_FSDP:
            raise ConfigError(f"training.fsdp_config.{key}: not offered; {_NOT_OF_FSDP[key]}")
        if key not in OF_FSDP:
            raise ConfigError(f"training.fsdp_config: unknown key '{key}'; {nearest(key, OF_FSDP)}")
    settings = {**OF_FSDP, **given}
    if int(settings["version"]) != 2:
        raise ConfigError("training.fsdp_config.version: FSDP1 is not offered; write fsdp_version: 2")
    if settings["state_dict_type"] not in STATE_DICTS:
        raise ConfigError(
            f"training.fsdp_config.state_dict_type: found '{settings['state_dict_type']}'; write "
            f"{' or '.join(STATE_DICTS)}"
        )
    return {key: value for key, value in settings.items() if value is not None}


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
