"""Runs of arms, one JSON file each: what is there and still valid is not run again.

A result is valid while its key is the same (the config, the seed, what is measured, the data files), and the code that
trains and measures (not this package's pages), unless results of other code are asked for. A killed run leaves no
result and starts again. Results that a page was written from lie beside it, one a line, and are read from there, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from eval.claims.declaration import Claim, Comparison, folders
from eval.files import fingerprint, read_json, write_json
from eval.tasks.local import available, select
from mmembed.errors import ConfigError, MmembedError

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("mmembed", "recipes/train_embedder.py", "eval/run.py", "eval/mteb_adapter.py", "eval/mteb_tasks.py",
        "eval/tasks", "eval/claims/measuring.py", "eval/claims/untrained.py")  # fmt: skip
# Until a run is kept: the demo's 300 steps of 64 queries take about five minutes on two quiet cores; around is a guess.
SECONDS_A_STEP, SECONDS_AROUND = 1.0, 45.0


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    claim: Claim
    arm: str
    seed: int
    steps: int
    data_root: Path

    @property
    def name(self) -> str:
        return f"{self.claim.name}: {self.arm}, seed {self.seed}"

    def folder(self, work: Path) -> Path:
        return work / self.claim.name / self.arm / f"seed-{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        return self.claim.config(self.arm, self.steps, self.seed)

    @property
    def key(self) -> str:
        """What makes the numbers, beside the code, as 16 hexadecimal digits."""
        claim = self.claim
        measures = [claim.tasks, claim.of_vectors, claim.dims, claim.instructions]
        text = json.dumps([self.config, measures, data_of(claim, self.data_root)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFailed(MmembedError):
    """A training or a measurement that ended with an error; its log says why."""


@cache
def code_digest() -> str:
    """Of the code that trains and measures, and of the packaged backbone, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in CODE:
        path = REPOSITORY / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".json", ".jinja", ".safetensors"):
                digest.update(file.relative_to(REPOSITORY).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def data_of(claim: Claim, root: Path) -> dict[str, str]:
    """folder -> fingerprint, of the sources and tasks. Raises ConfigError where the data root lacks one."""
    rows = select(available(root), claim.tasks)
    for folder in folders(claim, rows):
        if not (root / folder).is_dir():
            raise ConfigError(f"--data-root {root}: claim '{claim.name}' reads {folder}, which is not there")
    return {folder: fingerprint(root / folder) for folder in folders(claim, rows)}


def planned(claims: Iterable[Claim], seeds: int, steps: int, root: Path) -> list[Run]:
    """Seed by seed within a claim, so that a stop leaves arms that can be compared."""
    return [
        Run(claim, arm, seed, steps if claim.trained else 0, root)
        for claim in claims
        for seed in range(seeds if claim.trained else min(seeds, 1))
        for arm in claim.arms
    ]


@dataclass(frozen=True)
class Results:
    """What was measured before, and where.

    work: a folder a run. shipped: the results a page was written from. any_code: results of other code count.
    """

    work: Path
    shipped: Path | None = None
    any_code: bool = False

    def of(self, run: Run) -> dict[str, Any] | None:
        """The run's result, if it is there and was made by this config and data, and by this code."""
        path = run.folder(self.work) / "result.json"
        found = [read_json(path)] if path.is_file() else []
        found += self._shipped.get((run.claim.name, run.arm, run.seed), [])
        valid = [result for result in found if result["key"] == run.key]
        of_this_code = [result for result in valid if result["code"] == code_digest()]
        return next(iter(of_this_code or (valid if self.any_code else [])), None)

    @cached_property
    def _shipped(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        if self.shipped is not None and self.shipped.is_file():
            for line in self.shipped.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                found.setdefault((result["claim"], result["arm"], result["seed"]), []).append(result)
        return found


def execute(run: Run, work: Path) -> dict[str, Any]:
    """Trains and measures through the real commands; the result, also written.

    Raises:
        RunFailed: a command ended with an error (its output is in the run's folder), or the code changed meanwhile.
    """
    folder, code = run.folder(work), code_digest()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    claim, embedder, root = run.claim, folder / "embedder", str(run.data_root)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False), encoding="utf-8")
    command = "recipes.train_embedder" if claim.trained else "eval.claims.untrained"
    training = ["-m", command, "--config", str(folder / "config.yaml")]
    training += [f"data.root={root}", f"training.output_dir={embedder}", "training.disable_tqdm=true"]
    measuring = ["-m", "eval.claims.measuring", "--model", str(embedder), "--data-root", root]
    measuring += ["--instructions", claim.instructions, "--output", str(folder / "scores.json")]
    measuring += ["--tasks", *claim.tasks]
    measuring += ["--vectors", *claim.of_vectors] if claim.of_vectors else []
    measuring += ["--dims", *map(str, claim.dims)] if claim.dims else []
    seconds = {step: _command(command, folder / f"{step}.log", run)
               for step, command in (("training", training), ("measuring", measuring))}  # fmt: skip
    if code_digest.__wrapped__() != code:
        raise RunFailed(
            f"{run.name}: the code changed while it ran, so nobody knows what made its numbers; start again"
        )
    result = {
        "claim": claim.name, "arm": run.arm, "seed": run.seed, "steps": run.steps, "key": run.key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds, "code": code,
        "data": data_of(claim, run.data_root), "config": run.config, "scores": read_json(folder / "scores.json"),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    shutil.rmtree(embedder)
    return result


def _command(arguments: Sequence[str], log: Path, run: Run) -> float:
    """Seconds of a command whose output goes to `log`."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"} | os.environ
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            [sys.executable, *arguments], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise RunFailed(f"{run.name}: exit status {code}, the whole output is in {log}\n{tail}")
    return round(time.monotonic() - started, 1)


def value(result: Mapping[str, Any], comparison: Comparison) -> float:
    """The number of a comparison in a result. Raises ConfigError where the task has no such metric."""
    task = comparison.task if comparison.dim is None else f"{comparison.task}@{comparison.dim}"
    numbers = result["scores"][task]
    if comparison.metric not in numbers:
        raise ConfigError(f"claim '{result['claim']}': {task} has no metric '{comparison.metric}'; "
                          f"it has {', '.join(sorted(numbers))}")  # fmt: skip
    return float(numbers[comparison.metric])


def estimate(runs: Sequence[Run], done: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that `runs` take: a step as long as in `done`, results that are there, else as once measured."""
    trained = [result for result in done if result["steps"]]
    a_step, around = SECONDS_A_STEP, SECONDS_AROUND
    if trained:
        a_step = sum(result["seconds"]["training"] / result["steps"] for result in trained) / len(trained)
        around = sum(result["seconds"]["measuring"] for result in trained) / len(trained)
    return sum(run.steps * a_step + around for run in runs)
