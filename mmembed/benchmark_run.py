"""Scores of a model on a benchmark, by the command that everybody uses: `python -m eval.run`, in a process of its own.

So a number while training, or of a soup that is being cooked, is the number that an evaluation afterwards gives: no
second implementation, and mteb stays in `eval`. It costs a start (some ten seconds of imports) and the model's memory a
second time on the device; the process ends with this one, however this one ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmembed import guard
from mmembed.errors import ConfigError, MmembedError

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINES = ("bm25", "minilm")  # of eval.run, beside which no other stands
OF_LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def run_benchmark(model: Path, output: Path, options: Sequence[str] = (), first: str | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint folder.

    Args:
        output: the results file; `.log` beside it holds what the command said.
        options: more of `eval.run`: `--benchmark`, `--tasks`, `--limit`, `--device`, ...
        first: of a reranker, the model whose finds it orders.

    Returns:
        What `eval.run` writes (docs/evaluation.md); `main_scores` takes out the numbers of the model.

    Raises:
        MmembedError: the repository's `eval` is not here, or the command failed, with what it said last.
    """
    check_repository()
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    log = output.with_suffix(".log")
    systems = (
        ["--model", str(model.resolve())] if first is None else ["--model", first, "--rerank", str(model.resolve())]
    )
    alone = [] if first in BASELINES else ["--no-baselines"]
    command = [sys.executable, "-m", "eval.run", *systems, *alone, *options, "--output", str(output)]
    with log.open("wb") as file:
        status = subprocess.run(
            [sys.executable, "-I", guard.__file__, str(os.getpid()), *command],
            cwd=REPOSITORY, env=environment(), stdout=file, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    if status != 0 or not output.is_file():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise MmembedError(
            f"python -m eval.run ended with status {status} on {model}: {' / '.join(said) or 'it said nothing'}; all "
            f"it said is in {log}"
        )
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return results


def list_tasks(options: Sequence[str]) -> dict[str, str]:
    """task -> group, of `eval.run --list` with some of its options. Opens no data and takes a second, of public
    benchmarks ten.

    Raises:
        ConfigError: there is no such benchmark or task, with the nearest name, or an option does not go with it; as the
            command says it. Or the repository's `eval` is not here.
    """
    check_repository()
    command = [sys.executable, "-m", "eval.run", "--list", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ConfigError(said[-1].removeprefix("error: ") if said else f"eval.run ended with {done.returncode}")
    lines = [re.split(" {2,}", line) for line in done.stdout.split("\n\n")[0].splitlines()[2:]]
    return {task: group for task, group, *_ in lines}


def check_repository() -> None:
    """Raises ConfigError where the package is not in a checkout, which brings `eval`."""
    if not (REPOSITORY / "eval" / "run.py").is_file():
        raise ConfigError(
            f"benchmarks need the folder eval of mmembed's repository, and {REPOSITORY} has none; work in a checkout "
            "(pip install -e .)"
        )


def main_scores(results: dict[str, Any]) -> dict[str, float]:
    """task -> main score of the last system, which is the model that was asked for; tasks that it left out or that are
    missing are not there.

    >>> main_scores({"tasks": {"mbpp": {"scores": {"m": {"main": 0.5}}}, "nlvr": {"scores": {"m": None}}}})
    {'mbpp': 0.5}
    """
    scores = {task: list(entry["scores"].values())[-1] for task, entry in results["tasks"].items()}
    return {task: float(found["main"]) for task, found in scores.items() if found is not None}


def environment() -> dict[str, str]:
    """This process's environment for one that is no part of its launch."""
    return {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
