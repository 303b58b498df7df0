"""`mmembed fuse`: several trained models of one backbone become one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmembed.arguments import Parser
from mmembed.commands.common import add_command
from mmembed.errors import ConfigError, MmembedError

RULES = ("uniform", "linear", "slerp", "task_vectors", "delta_guided", "atlas")  # mmembed.fusion.rules loads torch
EVALUATION: dict[str, dict[str, Any]] = {  # options of `python -m eval.run`
    "benchmark": {"metavar": "NAME", "help": "as of eval.run (default local)"},
    "tasks": {"nargs": "+", "metavar": "NAME", "help": "names or globs (default: all of the benchmark)"},
    "split": {"help": "part of the local data (default dev); choose by another than you report"},
    "limit": {"type": int, "metavar": "N", "help": "queries a task"},
    "data-root": {"type": Path, "help": "folder of the local data sets"},
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "fuse",
        run,
        help="make one model of several: soups, task vectors, merges",
        description="""\
            Fuses embedders, or rerankers, that were trained from one backbone, adapters multiplied out, in float32,
            tensor by tensor. What is written is a whole model that loads like any other; its fusion.json says what was
            fused.

              mmembed fuse runs/a runs/b runs/c --output runs/soup
              mmembed fuse runs/retrieval runs/similarity --rule delta_guided --output runs/both
              mmembed fuse runs/a runs/b --rule task_vectors --weights 1 -0.5 --output runs/without-b""",
    )
    command.add_argument("models", nargs="+", help="folders of embedders, or of rerankers")
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace a model there")
    command.add_argument("--rule", choices=RULES, default="uniform", help="how they are summed (default uniform)")
    command.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of linear and task_vectors: one a model"
    )
    command.add_argument("--t", type=float, help="of slerp: from 0, the first model, to 1, the second (default 0.5)")
    command.add_argument(
        "--coefficients", type=Path, metavar="FILE", help="of atlas: the fusion.json of what was learned"
    )
    command.add_argument(
        "--base",
        help="what the models started from, for rules that need it (default: the last thing that all come from); the "
        "backbone of adapters whose own is gone",
    )
    command.add_argument(
        "--heads",
        choices=("rule", "mean"),
        default="rule",
        help="mean: of pooling, projection and head, where the rule needs a start that has none",
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: of the models)")
    command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file of weights (default 2GB)")
    greedy = command.add_argument_group("greedy soup", "the mean of those models whose mean scores best")
    greedy.add_argument(
        "--greedy", action="store_true", help="choose by the mean score of tasks, by python -m eval.run"
    )
    for flag, told in EVALUATION.items():
        greedy.add_argument(f"--{flag}", **told)
    greedy.add_argument("--first-stage", metavar="MODEL", help="of rerankers: the model whose finds they order")
    learned = command.add_argument_group(
        "atlas", "a coefficient for each model and tensor, learned from labelled records"
    )
    learned.add_argument(
        "--learn",
        type=Path,
        metavar="PATH",
        help="records to learn from (canonical JSON lines), or a YAML file with the blocks data, objective and "
        "training of a training",
    )
    learned.add_argument("--set", nargs="+", metavar="key=value", help="win over that file: training.max_steps=100")
    learned.add_argument("--device", help="that learns: cpu, cuda, ... (default: cuda where there is one)")
    return command


def run(arguments: argparse.Namespace) -> int:
    output = arguments.output
    if output.exists() and not (arguments.overwrite and output.is_dir()):
        raise MmembedError(f"{output}: exists already; choose another folder, or --overwrite a model")
    _refuse_idle(arguments)
    from mmembed.fusion.fuse import fuse

    block = rule_of(arguments)
    writing = {"base": arguments.base, "dtype": arguments.dtype, "max_shard_size": arguments.max_shard_size}
    if arguments.greedy:
        from mmembed.fusion.soup import greedy_soup

        first = arguments.first_stage
        first = str(Path(first).resolve()) if first is not None and Path(first).is_dir() else first
        options = _evaluation(arguments)
        told = greedy_soup(arguments.models, output, options, first=first, report=_report, **writing)
        count = len(told["models"])
        print(f"{output}: {count} of {len(arguments.models)} models, {told['greedy']['score']:.4f}")
        return 0
    record: dict[str, Any] = {}
    if arguments.learn is not None:
        block["coefficients"], record = _learned(arguments)
    fuse(arguments.models, output, block, heads=arguments.heads, record=record, **writing)
    print(f"{output}: {len(arguments.models)} models fused by {arguments.rule}")
    return 0


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that would have no effect."""
    given = vars(arguments)
    if arguments.greedy and arguments.rule != "uniform":
        raise ConfigError(f"--rule {arguments.rule}: a greedy soup is a mean; remove --rule or --greedy")
    if arguments.greedy and arguments.heads != "rule":
        raise ConfigError("--heads: has no effect on a mean; remove it")
    for flag in ("weights", "t", "coefficients"):
        if arguments.greedy and given[flag] is not None:
            raise ConfigError(f"--{flag}: no effect on a greedy soup, which is a mean; remove it")
    for flag in (*EVALUATION, "first-stage"):
        if given[flag.replace("-", "_")] is not None and not arguments.greedy:
            raise ConfigError(f"--{flag}: no effect without --greedy; remove it")
    if arguments.learn is not None and arguments.rule != "atlas":
        raise ConfigError(f"--learn: rule {arguments.rule} learns nothing; give --rule atlas, or remove it")
    if arguments.learn is not None and arguments.coefficients is not None:
        raise ConfigError("--learn and --coefficients: coefficients are learned or given; remove one")
    for flag in ("set", "device"):
        if given[flag] is not None and arguments.learn is None:
            raise ConfigError(f"--{flag}: no effect without --learn; remove it")


def _evaluation(arguments: argparse.Namespace) -> list[str]:
    """What was given of the options of `eval.run`, which runs in another folder."""
    options: list[str] = []
    for flag in EVALUATION:
        value = vars(arguments)[flag.replace("-", "_")]
        if flag == "data-root" and value is not None:
            value = Path(value).resolve()
        if value is not None:
            options += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return options


def _learned(arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The coefficients, and what `fusion.json` says of how they were learned."""
    from mmembed.config import read_tree
    from mmembed.fusion.learning import learn

    file = arguments.learn
    tree = {"data": {"train": [{"path": str(file.resolve())}]}}
    if file.suffix in (".yaml", ".yml"):
        tree = read_tree(file)
    found = learn(
        arguments.models,
        tree,
        overrides=arguments.set or [],
        where=str(file),
        base=arguments.base,
        heads=arguments.heads,
        device=arguments.device,
    )
    _report(f"loss {found.losses[0]:.4f} -> {found.losses[-1]:.4f} in {len(found.losses)} steps")
    record = {"learned_from": str(file), "losses": found.losses, "coefficients": found.coefficients}
    return found.coefficients, record


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def rule_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rule's block, with those options that were given. Raises ConfigError for a file that holds none."""
    block: dict[str, Any] = {"type": arguments.rule}
    block |= {key: vars(arguments)[key] for key in ("weights", "t") if vars(arguments)[key] is not None}
    if arguments.coefficients is not None:
        block["coefficients"] = read_coefficients(arguments.coefficients)
    return block


def read_coefficients(file: Path) -> dict[str, list[float]]:
    """tensor -> one number a model. Raises ConfigError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["coefficients"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--coefficients {file}: not a file of learned coefficients ({error}); --learn writes one"
        ) from error
