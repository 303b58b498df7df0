"""Runs of arms, one JSON file each: what is there and still valid is not run again.

A result is valid while its key is the same (the config, the seed, what is measured, the data files), and the code that
trains and measures (not this package's pages), unless results of other code are asked for. Arms of two claims that are
one config are one run. A killed run leaves no result and starts again. Results that a page was written from lie beside
it, one a line, and are read from there, too. What a claim makes before its arms (`stages`) is kept in the work folder
for this code, by config and seed, so arms and claims share it; a killed stage goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from eval.claims.declaration import (
    FIRST_STAGE,
    FUSES,
    WRITES_RECORDS,
    Claim,
    Comparison,
    folders,
    stages_in,
    with_folders,
)
from eval.files import REPOSITORY, digest_of_code, fingerprint, read_json, write_json
from eval.tasks.local import available, select
from mmembed.errors import ConfigError, MmembedError

CODE = ("mmembed", "recipes/train_embedder.py", "recipes/train_reranker.py", "data_tools/mine_negatives.py",
        "data_tools/score.py", "data_tools/mining", "eval/models.py", "eval/rows.py", "eval/scoring.py",
        "eval/stages.py", "eval/rerank.py", "eval/mteb_adapter.py", "eval/mteb_tasks.py", "eval/baselines.py",
        "eval/tasks", "eval/claims/measuring.py", "eval/claims/untrained.py")  # fmt: skip
MODULES = {"mine": "data_tools.mine_negatives", "score": "data_tools.score", "embedder": "recipes.train_embedder",
           "reranker": "recipes.train_reranker", FUSES: "mmembed"}  # fmt: skip
# Until a run is kept: the demo's 300 steps of 64 queries take about five minutes on two quiet cores; around is a guess.
SECONDS_A_STEP, SECONDS_AROUND = 1.0, 45.0


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `budget`: steps of the command, of which a claim's arms and stages take a multiple."""

    claim: Claim
    arm: str
    seed: int
    budget: int
    data_root: Path

    @property
    def steps(self) -> int:
        trained = self.claim.trained and self.claim.made(self.arm) is None
        return max(1, round(self.budget * self.claim.steps)) if trained else 0

    @property
    def name(self) -> str:
        return f"{self.claim.name}: {self.arm}, seed {self.seed}"

    def folder(self, work: Path) -> Path:
        """Of its logs."""
        return work / self.claim.name / self.arm / f"seed-{self.seed}"

    def result(self, work: Path) -> Path:
        return work / "results" / f"{self.key}.json"

    @property
    def config(self) -> dict[str, Any]:
        return self.claim.config(self.arm, self.steps, self.seed)

    @cached_property
    def key(self) -> str:
        """What makes the numbers, beside the code, as 16 hexadecimal digits."""
        claim = self.claim
        measures: list[Any] = [sorted(claim.tasks), claim.of_vectors, claim.dims, claim.by_query, claim.instructions]
        if claim.model == "reranker":
            measures += [claim.first_stages, claim.depth]
        if claim.stages:
            measures.append({name: self.stage_key(name) for name in claim.stages})
        text = json.dumps([self.config, measures, data_of(claim, self.data_root)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def stage_key(self, name: str) -> str:
        """What makes a stage, beside the code, as 16 hexadecimal digits: its config, what it reads."""
        config, stage = self.claim.stage_config(name, self.budget, self.seed), self.claim.stages[name]
        read = {other: self.stage_key(other) for other in stages_in(config)}
        text = json.dumps([stage.command, config, read, data_of(self.claim, self.data_root)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFailed(MmembedError):
    """A training or a measurement that ended with an error; its log says why."""


@cache
def code_digest() -> str:
    """Of the code that trains and measures, and of the packaged backbone, 16 hexadecimal digits."""
    return digest_of_code(CODE)


def place(folder: str | Path, root: Path) -> Path:
    """Of a folder or file of a data set: below the data root, or in `data/` what only the repository ships."""
    shipped = REPOSITORY / "data" / folder
    return shipped if shipped.exists() and not (root / folder).exists() else root / folder


def data_of(claim: Claim, root: Path) -> dict[str, str]:
    """folder -> fingerprint, of the sources and tasks. Raises ConfigError where the data root lacks one."""
    offered = available(root)
    if missing := sorted(set(claim.tasks) - {row.name for row in offered}):
        raise ConfigError(f"--data-root {root}: claim '{claim.name}' is measured on {', '.join(missing)}, "
                          "whose folder is not there")  # fmt: skip
    rows = select(offered, claim.tasks)
    for folder in folders(claim, rows):
        if not place(folder, root).is_dir():
            raise ConfigError(f"--data-root {root}: claim '{claim.name}' reads {folder}, which is not there")
    return {folder: fingerprint(place(folder, root)) for folder in folders(claim, rows)}


def distinct(runs: Iterable[Run]) -> list[Run]:
    """The first run of each key, in their order."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.key, run)
    return list(first.values())


def lacking(claim: Claim, root: Path) -> str | None:
    """Why a data root is too small for a claim, if it is; a set that is not there at all is `data_of`'s to refuse."""
    for folder, needed in claim.needs.items():
        judgements = root / folder / "qrels" / "train.tsv"
        if not judgements.is_file():
            continue
        lines = judgements.read_text(encoding="utf-8").splitlines()[1:]
        queries = len({line.split("\t")[0] for line in lines})
        if queries < needed:
            return (f"claim '{claim.name}' says nothing on {queries} train queries of {folder}: it needs {needed}; "
                    f"give a --data-root that holds all of the set (here {root})")  # fmt: skip
    return None


def planned(claims: Iterable[Claim], seeds: int, steps: int, root: Path) -> list[Run]:
    """Seed by seed within a claim, so that a stop leaves arms that can be compared."""
    return [
        Run(claim, arm, seed, steps, root)
        for claim in claims
        for seed in range(seeds if claim.trained else min(seeds, 1))
        for arm in claim.arms
    ]


@dataclass(frozen=True)
class Results:
    """What was measured before, and where.

    work: keeps them in `results`. shipped: the results a page was written from. any_code: results of other code count.
    """

    work: Path
    shipped: Path | None = None
    any_code: bool = False

    def of(self, run: Run) -> dict[str, Any] | None:
        """The run's result, if it is there and was made by this config and data, and by this code."""
        path = run.result(self.work)
        found = [read_json(path)] if path.is_file() else []
        found += self._shipped.get(run.key, [])
        of_this_code = [result for result in found if result["code"] == code_digest()]
        return next(iter(of_this_code or (found if self.any_code else [])), None)

    @cached_property
    def _shipped(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        if self.shipped is not None and self.shipped.is_file():
            for line in self.shipped.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                found.setdefault(result["key"], []).append(result)
        return found


class Workers:
    """Threads that each train and measure one arm at a time, by commands that end when this does.

    A run gets its share of the cores: two runs of one thread each finish earlier than one after the other with two.
    """

    def __init__(self, jobs: int, work: Path) -> None:
        self.work = work
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self._pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stages = threading.Lock(), threading.Lock()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def finished(self, runs: Iterable[Run]) -> Iterator[tuple[Run, dict[str, Any] | RunFailed]]:
        """Each run as it ends, begun in the order given; runs of one key are run once."""
        futures = {self._pool.submit(self._outcome, run): run for run in distinct(runs)}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _outcome(self, run: Run) -> dict[str, Any] | RunFailed:
        try:
            return execute(run, self.work, self.command, self._stages)
        except RunFailed as error:
            return error

    def command(self, arguments: Sequence[str], log: Path) -> int:
        """Exit status of a command of this interpreter whose output goes to `log`."""
        environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true",
                       "OMP_NUM_THREADS": str(self.threads)} | os.environ  # fmt: skip
        with log.open("w", encoding="utf-8") as output:
            with self._lock:
                if self._ended:
                    return -signal.SIGKILL
                process = subprocess.Popen(
                    [sys.executable, *arguments], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)


def execute(
    run: Run,
    work: Path,
    command: Callable[[Sequence[str], Path], int],
    one_at_a_time: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Trains and measures through the real commands, which `command` runs; the result, also written.

    Args:
        one_at_a_time: held while stages are made, which other runs may want, too.

    Raises:
        RunFailed: a command ended with an error (its output is in the run's folder), or the code changed meanwhile.
    """
    folder, code = run.folder(work), code_digest()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    claim, model, root = run.claim, folder / run.claim.model, str(run.data_root)
    seconds: dict[str, float] = {}
    with one_at_a_time or nullcontext():
        made = make_stages(run, work, command, seconds)
    steps: list[tuple[str, list[str]]] = []
    if (stage := claim.made(run.arm)) is not None:
        model = made[stage]
    else:
        config = placed(with_folders(run.config, made), run.data_root)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        module = MODULES[claim.model] if claim.trained else "eval.claims.untrained"
        command_of = ["-m", module, "--config", str(folder / "config.yaml"), *paths(config, root, model)]
        steps.append(("training", command_of))
    measuring = ["-m", "eval.claims.measuring", "--model", str(model), "--data-root", root]
    measuring += ["--instructions", claim.instructions, "--output", str(folder / "scores.json")]
    measuring += ["--tasks", *claim.tasks]
    measuring += ["--vectors", *claim.of_vectors] if claim.of_vectors else []
    measuring += ["--by-query", *claim.by_query] if claim.by_query else []
    measuring += ["--dims", *map(str, claim.dims)] if claim.dims else []
    first_stages = with_folders(claim.first_stages, made)
    if first_stages:
        measuring += ["--depth", str(claim.depth)]
        measuring += ["--first-stages", *(f"{name}={found_by}" for name, found_by in first_stages.items())]
    for step, arguments in (*steps, ("measuring", measuring)):
        seconds[step] = timed(f"{run.name}, {step}", arguments, folder / f"{step}.log", command)
    if code_digest.__wrapped__() != code:
        raise RunFailed(
            f"{run.name}: the code changed while it ran, so nobody knows what made its numbers; start again"
        )
    result = {
        "claim": claim.name, "arm": run.arm, "seed": run.seed, "steps": run.steps, "key": run.key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds, "code": code,
        "data": data_of(claim, run.data_root), "config": run.config, **read_json(folder / "scores.json"),
    }  # fmt: skip
    run.result(work).parent.mkdir(exist_ok=True)
    write_json(run.result(work), result)
    if stage is None:
        shutil.rmtree(model)
    return result


def make_stages(
    run: Run, work: Path, command: Callable[[Sequence[str], Path], int], seconds: dict[str, float]
) -> dict[str, Path]:
    """Makes what is not there of what the claim's stages make. Returns stage -> folder.

    Args:
        seconds: gets what it took, as `stages`.
    """
    made: dict[str, Path] = {}
    for name, stage in run.claim.stages.items():
        home = work / "stages" / f"{name}-{run.stage_key(name)}-{code_digest()[:8]}"
        folder, done = home / "output", home / "done"
        if not done.exists():
            home.mkdir(parents=True, exist_ok=True)
            config = with_folders(run.claim.stage_config(name, run.budget, run.seed), made)
            if stage.command in WRITES_RECORDS:
                config = {"root": str(run.data_root), **config, "output": str(folder)}
            file = home / "config.yaml"
            file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            arguments = ["-m", MODULES[stage.command], "--config", str(file)]
            if stage.command == FUSES:
                arguments = ["-m", MODULES[FUSES], *fusing(config), "--output", str(folder), "--overwrite"]
            elif stage.command not in WRITES_RECORDS:
                arguments += paths(config, str(run.data_root), folder)
            took = timed(f"{run.name}, stage {name}", arguments, home / "log", command)
            seconds["stages"] = round(seconds.get("stages", 0.0) + took, 1)
            done.touch()
        made[name] = folder
    return made


def fusing(config: Mapping[str, Any]) -> list[str]:
    """The arguments of `mmembed fuse`, without output.

    >>> fusing({"models": ["a", "b"], "rule": {"type": "linear", "weights": [3, 1]}, "heads": "mean"})
    ['fuse', 'a', 'b', '--rule', 'linear', '--weights', '3', '1', '--heads', 'mean']
    """
    rule = {"type": config["rule"]} if isinstance(config["rule"], str) else dict(config["rule"])
    options = {"rule": rule.pop("type"), **rule}
    options |= {key: value for key, value in config.items() if key not in ("models", "rule")}
    arguments = ["fuse", *config["models"]]
    for key, value in options.items():
        arguments += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def placed(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """A training's config whose sources that the data root lacks have the path of those in the repository."""
    if "root" in config["data"]:
        return config
    sources = [source | {"path": str(place(source["path"], root))} for source in config["data"]["train"]]
    return config | {"data": config["data"] | {"train": sources}}


def paths(config: Mapping[str, Any], root: str, output: Path) -> list[str]:
    """What a training takes beside its config: the data root, unless a stage made its data, and the output."""
    own = [] if "root" in config["data"] else [f"data.root={root}"]
    return [*own, f"training.output_dir={output}", "training.disable_tqdm=true"]


def timed(name: str, arguments: Sequence[str], log: Path, command: Callable[[Sequence[str], Path], int]) -> float:
    """Seconds of a command. Raises RunFailed with the end of its log."""
    started = time.monotonic()
    if status := command(arguments, log):
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise RunFailed(f"{name}: exit status {status}, the whole output is in {log}\n{tail}")
    return round(time.monotonic() - started, 1)


def value(result: Mapping[str, Any], comparison: Comparison, of: str = "") -> float:
    """The number of a comparison in a result; `of` first_stage: of the candidates as they came in.

    Raises:
        ConfigError: a task has no such metric.
    """
    values = []
    for task in comparison.scores:
        numbers = result["first_stage" if of == FIRST_STAGE else "scores"][task]
        if comparison.metric not in numbers:
            raise ConfigError(f"claim '{result['claim']}': {task} has no metric '{comparison.metric}'; "
                              f"it has {', '.join(sorted(numbers))}")  # fmt: skip
        values.append(float(numbers[comparison.metric]))
    return statistics.fmean(values)


def estimate(runs: Sequence[Run], done: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that `runs` take: a step as long as in `done`, results that are there, else as once measured."""
    trained = [result for result in done if result["steps"]]
    a_step, around = SECONDS_A_STEP, SECONDS_AROUND
    if trained:
        a_step = sum(result["seconds"]["training"] / result["steps"] for result in trained) / len(trained)
        around = sum(result["seconds"]["measuring"] + result["seconds"].get("stages", 0) for result in trained)
        around /= len(trained)
    return sum(run.steps * a_step + around for run in runs)
