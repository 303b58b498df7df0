"""The `evaluation` block: the model in training scored on tasks of a benchmark, by `python -m eval.run` itself.

The weights as they are go to a folder of the run, the first process has the command score them in a process of its own,
all processes get the numbers, and the folder goes again. So a number is the one that the command gives of a model that
is saved there, data and protocol included, and the run's random state is not touched. What stays in `evaluations`:
`step-N.json`, the scores of each query beside it (`eval.compare` reads them), and what the command said, `step-N.log`.

Costs each time: a copy of the trained weights on disk, ten seconds of imports, a second model in the memory of the
device, and the evaluation, in which the processes of the run wait.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmembed.benchmark_run import list_tasks, main_scores, run_benchmark
from mmembed.config.blocks import EmbedderConfig, EvaluationConfig
from mmembed.errors import ConfigError, MmembedError
from mmembed.training.data_vectors import agreed, agreed_later, check_device

logger = logging.getLogger(__name__)
FOLDER, MODEL, MEAN = "evaluations", "model", "benchmark"


def check_evaluation(config: EmbedderConfig) -> None:
    """All processes have to call it.

    Raises:
        ConfigError: there is no such benchmark, task or device, an option does not go with the benchmark, or a reranker
            is to do what it cannot.
    """
    if config.evaluation is None:
        return
    if config.evaluation.device is not None:
        check_device("evaluation.device", config.evaluation.device)
    groups = _groups(config.evaluation)
    metrics_of(groups)
    for task, group in groups.items() if config.head is not None and config.evaluation.benchmark == "local" else ():
        if "reranking" not in group:
            raise ConfigError(
                f"evaluation.tasks: '{task}' is of {group}, and a reranker orders the candidates of reranking tasks; "
                "name such, for example [dbpedia-entity/judged]"
            )


def metrics_of(tasks: Iterable[str]) -> dict[str, str]:
    """task -> its metric without the prefix, in the characters that all trackers take: `xquad/de` is `xquad_de`.

    Raises:
        ConfigError: two tasks would be one metric.

    >>> metrics_of(["stsb-en", "xquad/de"])
    {'stsb-en': 'stsb-en', 'xquad/de': 'xquad_de'}
    """
    names: dict[str, str] = {}
    for task in tasks:
        name = re.sub(r"[^\w.-]+", "_", task, flags=re.ASCII)
        if name in (*names.values(), MEAN, "seconds"):
            raise ConfigError(f"evaluation.tasks: '{task}' and another number would both be called '{name}'; drop it")
        names[task] = name
    return names


def benchmark_metrics(evaluation: EvaluationConfig | None) -> list[str]:
    """The metrics that the block gives; [] without one. All processes have to call it. ConfigError as
    `check_evaluation`."""
    return [] if evaluation is None else [*metrics_of(_groups(evaluation)).values(), MEAN]


def describe(evaluation: EvaluationConfig) -> str:
    """What is scored, in a line. All processes have to call it. ConfigError as `check_evaluation`."""
    names = list(_groups(evaluation))
    which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    limit = "" if evaluation.limit is None else f", {evaluation.limit} queries of each at most"
    where = "the first CUDA device, else the CPU" if evaluation.device is None else evaluation.device
    process = f"by a process of its own on {where}, with a second model in memory there"
    return f"{evaluation.benchmark}: {which}{limit}; {process}"


class Benchmark:
    """The benchmark of a run.

    Args:
        evaluation: the block. output: the run's folder, which the first process writes to.

    Attributes:
        measured: by step, what its weights scored in this process.

    Raises:
        ConfigError: as `check_evaluation`.
    """

    def __init__(self, evaluation: EvaluationConfig, output: Path) -> None:
        self.evaluation = evaluation
        self.metrics = metrics_of(_groups(evaluation))
        self.measured: dict[int, dict[str, float]] = {}
        self._output = output / FOLDER

    def __str__(self) -> str:
        return f"benchmark: {describe(self.evaluation)}"

    def folder(self, step: int) -> Path:
        """Where the weights of a step are written to be scored, as `MODEL`."""
        return self._output / f"step-{step}"

    def score(self, step: int) -> dict[str, float]:
        """metric -> main score of each task, and their mean, of the weights in `folder(step)`, which is removed. All
        processes have to call it.

        Raises:
            MmembedError: the command failed, or a task gave no number: its data cannot be had, or are none for this
                model.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what training does not hold is free for the second model
        logger.info("step %d is scored by python -m eval.run; what it says: %s.log", step, self.folder(step))
        self.measured[step] = agreed_later(functools.partial(self._scored, step))
        return self.measured[step]

    def _scored(self, step: int) -> dict[str, float]:
        folder = self.folder(step)
        try:
            results = run_benchmark(folder / MODEL, folder.with_name(f"{folder.name}.json"), _options(self.evaluation))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        scores = main_scores(results)
        for task in self.metrics:
            if task not in scores:
                raise MmembedError(
                    f"evaluation.tasks: '{task}' gave no number: {_reason(results, task)}. Take it out of the tasks; "
                    "training.eval_on_start shows such things before the first step"
                )
        named = {metric: scores[task] for task, metric in self.metrics.items()}
        return {**named, MEAN: float(np.mean(list(named.values())))}


@functools.cache
def _groups(evaluation: EvaluationConfig) -> Mapping[str, str]:
    """task -> group, as the command lists them; asked once by the first process."""

    def listed() -> dict[str, str]:
        options = _options(evaluation.model_copy(update={"limit": None, "device": None}))
        try:
            return list_tasks(options)
        except ConfigError as error:
            keys = "|".join(name.replace("_", "-") for name in EvaluationConfig.model_fields)
            named = re.sub(f"--({keys})\\b", lambda found: f"evaluation.{found[1].replace('-', '_')}", str(error))
            raise ConfigError(named if named != str(error) else f"evaluation: {error}") from None

    return agreed(listed)


def _options(evaluation: EvaluationConfig) -> list[str]:
    """Of the command, which runs in another folder."""
    found = ["--benchmark", evaluation.benchmark]
    for flag, values in (("--tasks", evaluation.tasks), ("--languages", evaluation.languages)):
        found += [flag, *values] if values else []
    given = {
        "--limit": evaluation.limit,
        "--data-root": evaluation.data_root and Path(evaluation.data_root).resolve(),
        "--source": evaluation.source if evaluation.source in (None, "hub") else Path(evaluation.source).resolve(),
        "--device": evaluation.device,
    }
    for flag, value in given.items():
        found += [flag, str(value)] if value is not None else []
    return found


def _reason(results: Mapping[str, Any], task: str) -> str:
    """Why a task has no number, in the command's words."""
    reasons: dict[str, str] = dict(results["missing"])
    for of_model in results["left_out"].values():  # of the one model that there is
        reasons |= of_model
    return reasons.get(task, "the command gives no reason")
