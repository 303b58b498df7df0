"""Which checkpoint a run goes on from, and whether it is a checkpoint of this run at all.

A checkpoint counts when its trainer state, written last, is there. Beside it stands `training_run.json`: the config,
the rows of a global batch, the number of processes, who wrote the optimizer's state, and a digest of the data. A run
goes on from a checkpoint only where all that decides its trajectory is what it was: otherwise the result would silently
be another model. What decides nothing (folders, logging, how often is saved, workers) may change, and so may the number
of processes while their batches together stay the same (not with DeepSpeed).

`training.resume_from_checkpoint`:
- auto (the default): the last complete checkpoint of `output_dir`, from the start where there is none;
- true: the same, but there has to be one;
- false: from the start, refused where there is a checkpoint: nothing is overwritten;
- a path: that checkpoint; what differs is said as a warning, because it was asked for by name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainingArguments

from mmembed.config.blocks import EmbedderConfig
from mmembed.errors import CheckpointError, ConfigError
from mmembed.objectives.gather import world
from mmembed.training.lost_worker import is_of_connection

logger = logging.getLogger(__name__)
STATE, RUN = "trainer_state.json", "training_run.json"
KEY = "training.resume_from_checkpoint"
_FREE = frozenset(  # change no step of a trajectory; the batch of a process is compared as rows of all processes
    f"training.{key}"
    for key in (
        *("output_dir", "resume_from_checkpoint", "per_device_train_batch_size", "ddp_timeout"),
        *("logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "project"),
        *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "skip_memory_metrics"),
        *("save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "vision_cache", "vision_cache_gb"),
        *("worst_batch_first",),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    )
) | {
    *("data.root", "data.media_root", "data.mining.device"),  # what lies in the folders is compared by its records
    *("evaluation.data_root", "evaluation.source", "evaluation.device"),
}

_OWN_BATCH = re.compile(r"data\.train\.\d+\.batch_size")  # as that of all sources


def describe_run(config: EmbedderConfig, args: TrainingArguments) -> dict[str, Any]:
    """What `training_run.json` says, but for the `sources`: a name, the rows and a digest of each. `of_sources`: rows
    of a global batch of those that have their own."""
    return {
        "config": config.model_dump(mode="json"),
        "world_size": args.world_size,
        "global_batch_size": args.world_size * args.per_device_train_batch_size,
        "of_sources": {one.name: args.world_size * one.batch_size for one in config.data.train if one.batch_size},
        "state": _state_of(args),
    }


def read_run(checkpoint: Path) -> dict[str, Any]:
    """`training_run.json` of a checkpoint. Raises CheckpointError where it is missing or broken."""
    file = checkpoint / RUN
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(described["config"], dict):
            raise ValueError("no config in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: missing or broken ({error}), so nobody can tell which run the checkpoint is of; resume from "
            "another one, or give another training.output_dir"
        ) from error
    return described


def checkpoint_to_resume(config: EmbedderConfig, args: TrainingArguments) -> str | None:
    """The checkpoint that the run goes on from; None: from the start. All processes get the answer of the first.

    Raises:
        CheckpointError: there is none where one is asked for, or it is not one of this run: with what differs.
        ConfigError: `false`, and the output folder holds a checkpoint.
    """
    answer: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            found = _chosen(config, args)
            answer = [None if found is None else str(found), None]
        except (CheckpointError, ConfigError) as error:
            answer = [None, error]
    if world()[1] > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    if answer[0] is not None and not Path(answer[0], STATE).exists():
        raise CheckpointError(
            f"process {args.process_index} does not see {answer[0]}, which the first process found; "
            "training.output_dir has to lie on a file system that all hosts share"
        )
    return answer[0]


def check_same_data(checkpoint: Path, sources: Sequence[dict[str, Any]], config: EmbedderConfig) -> None:
    """Refuses to go on over other records than the checkpoint's run had: its place in them would mean nothing.

    Raises:
        CheckpointError: with the source, and what to do; a warning where the checkpoint was asked for by its path.
    """
    _refuse(checkpoint, _other_data(read_run(checkpoint)["sources"], sources), named=_asked(config) not in _WORDS)


def check_finished(
    folder: Path, config: EmbedderConfig, args: TrainingArguments, sources: Sequence[dict[str, Any]]
) -> None:
    """Refuses to take the result of a run for that of another one: what decides a trajectory has to be what it was.

    Args:
        folder: of a run that has ended.
        config, args: of the run that would be there now, `inherit_settings` applied.
        sources: name, rows and digest of each, as `training_run.json` has them.

    Raises:
        CheckpointError: with what differs.
    """
    saved, run = read_run(folder), describe_run(config, args)
    lines = _other_settings(saved["config"], run["config"])
    rows, own = saved["global_batch_size"], saved.get("of_sources", {})
    batches = {"all sources": (rows, run["global_batch_size"])} | {
        f"'{name}'": (own.get(name, rows), run["of_sources"].get(name, run["global_batch_size"]))
        for name in sorted(own.keys() | run["of_sources"].keys())
    }
    lines += [f"a batch of {of}: {old} rows then, {new} now" for of, (old, new) in batches.items() if old != new]
    lines += _other_data(saved["sources"], sources)
    if lines:
        raise CheckpointError(
            f"{folder}: is finished, under other settings:\n  " + "\n  ".join(lines) + "\nSet these back, give another "
            "training.output_dir, or delete the folder, and those that follow from it, to train it anew"
        )


def last_checkpoint(output_dir: str | Path) -> Path:
    """The last complete checkpoint of a run: one whose trainer state, written last, is there.

    Raises:
        CheckpointError: there is none.
    """
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE}") if _is_json(path)]
    if not complete:
        raise CheckpointError(f"{output_dir}: holds no complete checkpoint to resume from; start without resuming")
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))


@contextmanager
def writing(path: Path, run: str) -> Iterator[None]:
    """Raises CheckpointError for whatever fails while `path` is written: each library reports a full disk its own way.

    The message names the checkpoint of `run` to go on from.
    """
    try:
        yield
    except (CheckpointError, OSError, RuntimeError, SafetensorError) as error:
        if is_of_connection(error):
            raise
        known = isinstance(error, CheckpointError)
        found = str(error) if known else f"{path}: could not be written ({error}). Free disk space"
        raise CheckpointError(f"{found}. {how_to_go_on(run)}") from error


def how_to_go_on(run: str | Path) -> str:
    """What the same command would do after a stop."""
    try:
        return f"{last_checkpoint(run)} is complete: the same command goes on from it"
    except CheckpointError:
        return "There is no complete checkpoint: the same command begins at the start"


_WORDS = ("auto", "true", "false")
_WHOLE, _ZERO, _FSDP = "whole", "deepspeed", "fsdp"


def _state_of(args: Any) -> str:
    """The form in which the optimizer's state is written: each is read by what wrote it alone."""
    if args.deepspeed:
        return f"{_ZERO}-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp:
        return f"{_FSDP}-{args.fsdp_config['state_dict_type']}"
    return _WHOLE


def _in_words(state: str) -> str:
    form, _, kind = state.partition("-")
    return {_ZERO: f"DeepSpeed ZeRO-{kind}", _FSDP: f"FSDP2 ({kind})"}.get(form, "one process or DDP")


def _asked(config: EmbedderConfig) -> str:
    asked = config.training.arguments.get("resume_from_checkpoint")
    return "auto" if asked is None else str(asked).lower() if isinstance(asked, bool) else str(asked)


def _chosen(config: EmbedderConfig, args: TrainingArguments) -> Path | None:
    asked, run = _asked(config), describe_run(config, args)
    if asked not in _WORDS:
        found = Path(asked)
        if not _is_json(found / STATE):
            raise CheckpointError(f"{KEY}: {found} is no complete checkpoint; name a folder checkpoint-N of a run")
    else:
        try:
            found = last_checkpoint(config.training.output_dir)
        except CheckpointError:
            if asked == "true":
                raise
            return None
        if asked == "false":
            raise ConfigError(
                f"{KEY}: false, but {found} is a complete checkpoint, which a new run would replace; give another "
                "training.output_dir, delete it, or leave the key out to go on from it"
            )
    saved = read_run(found)
    if not list(found.glob("rng_state*")):  # of every process, the last but the state
        raise CheckpointError(
            f"{found}: holds weights alone (training.save_only_model), without optimizer and random states to go on "
            "with; start another run from it (model.name_or_path) in another training.output_dir"
        )
    _check_batches(found, saved, run)
    _refuse(found, _other_settings(saved["config"], run["config"]), named=asked not in _WORDS)
    logger.info("going on from %s", found)
    return found


def _other_settings(saved: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What of two configs differs and decides a trajectory, a line each; batches are compared as rows."""
    before, now = _flat(saved), _flat(run)
    return [
        f"{key}: {before.get(key, '(not set)')!r} then, {now.get(key, '(not set)')!r} now"
        for key in sorted(before.keys() | now.keys())
        if key not in _FREE and not _OWN_BATCH.fullmatch(key) and before.get(key) != now.get(key)
    ]


def _other_data(saved: Sequence[dict[str, Any]], sources: Sequence[dict[str, Any]]) -> list[str]:
    """Which sources hold other records; their number is of the config."""
    lines = []
    for old, new in zip(saved, sources, strict=False):
        if old["rows"] != new["rows"]:
            lines.append(f"data source '{new['name']}': {_rows(old)} then, {_rows(new)} now")
        elif old["digest"] != new["digest"]:
            lines.append(f"data source '{new['name']}': its records are others than they were, or in another order")
    return lines


def _refuse(checkpoint: Path, lines: Sequence[str], named: bool) -> None:
    if lines and named:
        logger.warning("%s: going on although it is of another run:\n  %s", checkpoint, "\n  ".join(lines))
    elif lines:
        raise CheckpointError(
            f"{checkpoint}: is of another run:\n  " + "\n  ".join(lines) + "\nGive another training.output_dir, set "
            f"these back, or name the checkpoint ({KEY}={checkpoint}) to go on from it under the new settings"
        )


def _check_batches(checkpoint: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    """The position in the data can be kept while a global batch has the same rows."""
    processes, rows = saved["world_size"], saved["global_batch_size"]
    if rows != run["global_batch_size"]:
        remedy = (
            f"set training.per_device_train_batch_size to {rows // run['world_size']}"
            if rows % run["world_size"] == 0
            else f"use a number of processes that divides {rows}"
        )
        raise CheckpointError(
            f"{checkpoint}: a batch had {rows} rows ({processes} processes x {rows // processes}), now it would have "
            f"{run['global_batch_size']} ({run['world_size']} x {run['global_batch_size'] // run['world_size']}): the "
            f"run could not go on at the same place in its data. Instead {remedy}"
        )
    own, ours = saved.get("of_sources", {}), run["of_sources"]  # no entry in what earlier versions wrote
    for name in sorted(own.keys() | ours.keys()):
        before, now = own.get(name, rows), ours.get(name, rows)
        if before != now:
            raise CheckpointError(
                f"{checkpoint}: a batch of '{name}' had {before} rows ({processes} processes), now it would have {now} "
                f"({run['world_size']}): the run could not go on at the same place in its data. Set the source's "
                f"batch_size so that {before} rows come together"
            )
    if saved["state"] != run["state"]:
        raise CheckpointError(
            f"{checkpoint}: the optimizer's state was written by {_in_words(saved['state'])}, now there is "
            f"{_in_words(run['state'])}, which cannot read it; launch the run as it was launched"
        )
    if processes != run["world_size"] and run["state"].startswith(_ZERO):
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed cut the optimizer's state into parts for {processes} processes, now there are "
            f"{run['world_size']}; resume with {processes}"
        )


def _rows(source: dict[str, Any]) -> str:
    return "a stream" if source["rows"] is None else f"{source['rows']:,} records"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists by index; empty blocks are left out."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    return {key: value for name, inner in items for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def _is_json(path: Path) -> bool:
    """Whether a file was written whole: a kill may have cut it."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
