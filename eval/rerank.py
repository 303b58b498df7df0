"""Measures rerankers over fixed candidates of a first stage.

    python -m eval.rerank --model runs/reranker --first-stage bm25 --depth 50 --output runs/rerank

The first stage finds `--depth` documents of each query, once; every reranker orders the same ones. In reranking tasks
(`argkp`, `nlvr`, `dbpedia-entity/judged`) the candidates are those that people judged. Beside the orders of both
stages stands the ceiling, the best order of the candidates: what the first stage has missed no reranker finds.

Numbers of a ranking are trec_eval's, over all judged documents of a query. Two concern scores: `auc`, one ROC curve of
the pairs of all queries together, and `ece`, how far the probabilities are from the share of pairs that is relevant.
Documents that nobody judged count as not relevant in both, as in rankings.
"""

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import HUB
from eval.circumstances import machine, versions
from eval.examples import SHOWN, Examples
from eval.files import REPOSITORY, read_json, write_json
from eval.models import Loaded, add_model_options, check_names, check_options, is_hub_name, is_reranker, load
from eval.rerank_report import NAMES, markdown, render
from eval.significance import interval_of_means
from eval.tasks import mrb
from eval.tasks.local import ROWS, Row, available, select
from mmembed import metrics
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

KINDS = ("retrieval", "reranking")
DEPTH, BINS = 50, 10
QUERIES_SHOWN = 2  # of a task on the page
UNCALIBRATED = {
    "ece": None,
    "bins": [[0, 0.0, 0.0]] * BINS,
}  # of rerankers that read lists: shares are no probabilities
CANDIDATES, EXAMPLES = "candidates.json", "examples.json"


@dataclass(frozen=True)
class Work:
    """One task with its data loaded. `column`: of MRB; `stands_in`: whether it is none of MRB's sets."""

    row: Row
    group: str
    task: Any
    split: str
    column: str | None = None
    stands_in: bool = False
    set: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    hub = options.mrb_sets == HUB
    if not hub and not any(is_hub_name(name) for name in (*options.model, options.first_stage)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not hub:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        results = evaluate(options)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + (options.output / "table.md").read_text(encoding="utf-8"))
    print(f"Report: {options.output / 'report.html'}" if results["tasks"] else "nothing could be measured")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.rerank", description="Measure rerankers over fixed candidates of a first stage."
    )
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="PATH", help="folders of rerankers; several are put side by side"
    )
    parser.add_argument(
        "--first-stage",
        default="bm25",
        metavar="MODEL",
        help=f"bm25, minilm or an embedder (default: bm25), or the {CANDIDATES} of an earlier run",
    )
    parser.add_argument(
        "--depth", type=int, default=DEPTH, help=f"candidates a query, the best of the first stage (default: {DEPTH})"
    )
    parser.add_argument("--benchmark", default="local", choices=["local", "mrb"], help="which tasks (default: local)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="of local: names or globs (default: all rankings)")
    parser.add_argument(
        "--mrb-sets",
        metavar="hub|FOLDER",
        help="of mrb: read its sets from the hub, or from copies in FOLDER/<name in mteb>; what is not there, and all "
        "without this, is stood in for by local tasks",
    )
    parser.add_argument("--split", default="dev", help="part of the local data that is evaluated (default: dev)")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=REPOSITORY / "data",
        help="folder of the local data sets (default: the slice in the repository)",
    )
    parser.add_argument(
        "--max-queries", type=int, metavar="N", help="of each task, drawn by a hash of their ids (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/rerank"),
        metavar="DIR",
        help=f"for results.json, table.md, report.html and {CANDIDATES} (default: runs/rerank)",
    )
    add_model_options(parser)
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both stages on every task; the results, also written to `options.output` after every task."""
    from mmembed.inference.devices import check_device

    check(options)
    check_device(options.device)
    started, examples = time.monotonic(), list[dict[str, Any]]()
    names = task_names(options)
    first = FirstStage(options, names)
    models = [load(name, options, names) for name in options.model]
    results: dict[str, Any] = {
        "benchmark": options.benchmark, "split": options.split, "max_queries": options.max_queries,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "machine": machine(),
        "first_stage": {"depth": options.depth, **first.provenance},
        "models": {model.name: model.provenance for model in models},
        "tasks": {}, "left_out": {}, "averages": {},
    }  # fmt: skip
    for work in works(options, results["left_out"]):
        found = first.find(work)
        if found is None:
            results["left_out"][work.row.name] = f"no candidates of {first.name}"
            continue
        print(work.row.name, end="", flush=True)
        results["tasks"][work.row.name], runs = measure(work, found, models)
        examples += shown(work, {first.name: found, **runs})
        print("".join(f"  {name} {score['ndcg_at_10']:.3f}" if score else f"  {name} –"
                      for name, score in results["tasks"][work.row.name]["scores"].items()), flush=True)  # fmt: skip
        work.task.unload_data()
        results["averages"] = averages(results)
        results["seconds"] = round(time.monotonic() - started, 1)
        write(options.output, results, first.candidates, examples)
    write(options.output, results, first.candidates, examples)
    return results


def write(
    folder: Path, results: dict[str, Any], candidates: dict[str, Any], examples: Sequence[Mapping[str, Any]]
) -> None:
    write_json(folder / "results.json", results)
    write_json(folder / CANDIDATES, candidates, indent=None)
    write_json(folder / EXAMPLES, list(examples), indent=None)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    (folder / "report.html").write_text(render(results, examples), encoding="utf-8")


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be, before anything is loaded."""
    for name in options.model:
        if not is_reranker(name):
            there = "no reranker; train one with recipes/train_reranker.py" if Path(name).is_dir() else "not there"
            raise ConfigError(f"--model {name}: {there}; embedders are measured by python -m eval.run")
    for flag in ("depth", "max_queries"):
        value = vars(options)[flag]
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: found {value}; give at least 1")
    if options.benchmark == "mrb" and options.tasks:
        raise ConfigError("--tasks: no effect on mrb, whose sets are given; remove it")
    if options.benchmark != "mrb" and options.mrb_sets is not None:
        raise ConfigError("--mrb-sets: no effect without --benchmark mrb; remove it")
    if options.mrb_sets not in (None, HUB) and not Path(options.mrb_sets).is_dir():
        raise ConfigError(f"--mrb-sets {options.mrb_sets}: neither '{HUB}' nor a folder")
    models = list(options.model)
    if not options.first_stage.endswith(".json"):
        check_names([options.first_stage], "--first-stage")
        if is_reranker(options.first_stage):
            raise ConfigError(
                f"--first-stage: '{options.first_stage}' is a reranker and finds nothing; give an embedder"
            )
        models.append(options.first_stage)
    check_options(options, models)


# Tasks ----------------------------------------------------------------------------------------------------------------


def task_names(options: argparse.Namespace) -> list[str]:
    """Every task that may be run."""
    if options.benchmark == "local":
        return [row.name for row in local_rows(options)]
    stand_ins = [name for names in mrb.STAND_INS.values() for name in names]
    return [*stand_ins, *(task for one in mrb.SETS for task in one.tasks)]


def local_rows(options: argparse.Namespace) -> list[Row]:
    rows = [row for row in available(options.data_root) if row.kind in KINDS]
    if not options.tasks:
        return rows
    others = {row.name for row in ROWS if row.kind not in KINDS}
    if named := sorted(others.intersection(options.tasks)):
        raise ConfigError(f"--tasks: '{named[0]}' has nothing to rank; a reranker orders candidates of queries")
    return select(rows, options.tasks)


def works(options: argparse.Namespace, left_out: dict[str, str]) -> Iterator[Work]:
    """The tasks with their data, one after the other; `left_out` gets those that are not there, with the reason."""
    if options.benchmark == "local":
        for row in local_rows(options):
            yield from _local(row, row.group, options, left_out)
        return
    for column, (group, _) in mrb.COLUMNS.items():
        found = False
        for one in (one for one in mrb.SETS if one.column == column):
            for row in one.rows:
                for work in _of_mrb(row, one, f"{group}, {column}", options, left_out):
                    found = True
                    yield work
        if not found:
            rows = {row.name: row for row in available(options.data_root)}
            for name in mrb.STAND_INS.get(column, ()):
                if name in rows:
                    yield from _local(rows[name], f"{group}, {column}", options, left_out, column)


def _local(
    row: Row, group: str, options: argparse.Namespace, left_out: dict[str, str], column: str | None = None
) -> Iterator[Work]:
    from eval.mteb_tasks import EmptyTask, build_task
    from eval.sets import Cut, cut

    task = build_task(row, options.data_root, options.split)
    try:
        task.load_data()
    except EmptyTask as error:
        left_out[row.name] = str(error)
        return
    cut(task, Cut(queries=options.max_queries, rows=options.max_queries))
    yield Work(row, group, task, options.split, column, column is not None, row.name)


def _of_mrb(
    row: Row, one: mrb.Set, group: str, options: argparse.Namespace, left_out: dict[str, str]
) -> Iterator[Work]:
    import mteb

    from eval.sets import Cut, MissingSet, Source, check_rankings, cut, open_task

    if options.mrb_sets is None:
        return
    task: Any = mteb.get_task(row.name)
    try:
        open_task(task, Source(None if options.mrb_sets == HUB else Path(options.mrb_sets)))
        check_rankings(task)
    except MissingSet as error:
        left_out[row.name] = str(error)
        return
    (split,) = task.metadata.eval_splits
    cut(task, Cut(queries=options.max_queries, rows=options.max_queries))
    yield Work(row, group, task, split, one.column, False, one.name)


# Candidates -----------------------------------------------------------------------------------------------------------


class FirstStage:
    """A model that finds candidates, or a file of those that were found before.

    Attributes:
        candidates: task -> `fingerprint` of its data, and `found`, query -> document -> score.
    """

    def __init__(self, options: argparse.Namespace, names: Sequence[str]) -> None:
        self.depth, self._named = options.depth, options.tasks is not None
        self.candidates: dict[str, Any] = {"depth": self.depth, "tasks": {}}
        self._model: Loaded | None = None
        self._kept: dict[str, Any] = {}
        if options.first_stage.endswith(".json"):
            kept = _read_candidates(Path(options.first_stage), self.depth)
            self.name, self._kept, self.provenance = kept["first_stage"]["name"], kept["tasks"], kept["first_stage"]
        else:
            self._model = load(options.first_stage, options, names)
            self.name = self._model.name
            self.provenance = {"name": self.name, **self._model.provenance}
        self.candidates["first_stage"] = self.provenance

    def find(self, work: Work) -> dict[str, dict[str, float]] | None:
        """query -> document -> score, the best `depth` of each query; None where the model cannot read the task, or the
        file has nothing for it and nobody has named it.

        Raises:
            ConfigError: a file of candidates has none of a task that was named, or they are of other data.
        """
        from eval.stages import best, find

        name, revision = work.row.name, str(work.task.metadata.revision)
        if self._model is None and name not in self._kept and not self._named:
            return None
        if self._model is None:
            found = _kept_candidates(self._kept, name, revision, work)
        elif self._model.supports(work.row):
            found = find(self._model.runner, work.task, work.split, self.depth)
        else:
            return None
        if work.task.ignore_identical_ids:
            found = {query: {key: value for key, value in documents.items() if key != query}
                     for query, documents in found.items()}  # fmt: skip
        found = {query: best(documents, self.depth) for query, documents in found.items()}
        self.candidates["tasks"][name] = {"fingerprint": revision, "found": found}
        return found


def _read_candidates(file: Path, depth: int) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = read_json(file)
        deepest = int(kept["depth"])
        kept["first_stage"]["name"], kept["tasks"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--first-stage {file}: no candidates of an earlier run ({error}); give its {CANDIDATES}"
        ) from error
    if deepest < depth:
        raise ConfigError(f"--depth: found {depth}, and {file} holds {deepest} a query; give that or less")
    return kept


def _kept_candidates(kept: Mapping[str, Any], name: str, revision: str, work: Work) -> dict[str, dict[str, float]]:
    if name not in kept:
        raise ConfigError(f"--first-stage: the file holds no candidates of {name}; name other tasks, or find them anew")
    if kept[name].get("fingerprint", revision) != revision:  # candidates of another system need not say it
        raise ConfigError(f"--first-stage: the candidates of {name} are of other data; find them anew")
    found: dict[str, dict[str, float]] = kept[name]["found"]
    data = work.task.dataset["default"][work.split]
    queries, documents = list(data["queries"]["id"]), set(data["corpus"]["id"])
    if missing := [query for query in queries if query not in found]:
        raise ConfigError(f"--first-stage: the file holds no candidates of query '{missing[0]}' of {name}")
    if strange := [key for query in queries for key in found[query] if key not in documents]:
        raise ConfigError(f"--first-stage: {name} has no document '{strange[0]}', which the file names")
    return {query: found[query] for query in queries}


# Numbers --------------------------------------------------------------------------------------------------------------


def measure(
    work: Work, found: Mapping[str, Mapping[str, float]], models: Sequence[Loaded]
) -> tuple[dict[str, Any], dict[str, metrics.Run]]:
    """The numbers of both stages on one task, and what each model gave: query -> document -> score."""
    from eval.stages import judge

    data = work.task.dataset["default"][work.split]
    qrels = data["relevant_docs"]
    ideal = {query: {key: float(qrels[query].get(key, 0)) for key in documents} for query, documents in found.items()}
    start, base = numbers(found, qrels)
    entry: dict[str, Any] = {
        "group": work.group, "column": work.column, "set": work.set, "stands_in": work.stands_in,
        "data": work.row.folder, "fingerprint": str(work.task.metadata.revision),
        "documents": len(data["corpus"]), "queries": len(found), "pairs": sum(map(len, found.values())),
        "graded": any(value not in (0, 1) for judged in qrels.values() for value in judged.values()),
        "first_stage": start, "ceiling": numbers(ideal, qrels)[0]["ndcg_at_10"], "scores": {},
    }  # fmt: skip
    runs: dict[str, metrics.Run] = {}
    for model in models:
        if not model.supports(work.row):
            entry["scores"][model.name] = None
            continue
        began = time.monotonic()
        run = runs[model.name] = judge(model.runner, work.task, work.split, found)
        seconds = round(time.monotonic() - began, 2)
        score, by_query = numbers(run, qrels)
        if not model.provenance["scores"]:
            score["auc"] = None  # places of one query say nothing beside those of another
        gain = by_query - base  # (Q,)
        bounds = interval_of_means([gain.tolist()])
        entry["scores"][model.name] = {
            **score, **(reliability(run, qrels) if model.provenance["calibrated"] else UNCALIBRATED),
            "gain": round(float(gain.mean()), 5), "gain_low": None if bounds is None else round(bounds[0], 5),
            "gain_high": None if bounds is None else round(bounds[1], 5), "seconds": seconds,
        }  # fmt: skip
    return entry, runs


def shown(work: Work, stages: Mapping[str, metrics.Run]) -> list[dict[str, Any]]:
    """What each stage puts first for some queries, drawn by a hash of their ids, as the page shows it."""
    from eval.stages import best

    picker = Examples(work.task.dataset["default"][work.split])
    return [
        {
            "task": work.row.name,
            **picker.of(query, {name: list(best(run[query], SHOWN)) for name, run in stages.items()}),
        }
        for query in picker.drawn()[:QUERIES_SHOWN]
    ]


def numbers(run: metrics.Run, qrels: metrics.Qrels) -> tuple[dict[str, Any], np.ndarray]:
    """The means over queries and the AUC of one run, and its nDCG@10 of each query (Q,)."""
    ranked, judged = metrics.rank_run(run, qrels)  # (Q, C), (Q, R)
    width = max(1, ranked.shape[1])
    by_query = metrics.ndcg_at_k(ranked, judged, 10)
    scores, relevance, valid = matrices(run, qrels)
    area = metrics.pooled_auc(scores, relevance, k=width, valid=valid)
    means = {
        "ndcg_at_10": by_query, "mrr": metrics.reciprocal_rank_at_k(ranked, width),
        "map": metrics.average_precision_at_k(ranked, judged, width), "p_at_1": metrics.precision_at_k(ranked, 1),
    }  # fmt: skip
    rounded: dict[str, Any] = {name: round(float(values.mean()), 5) for name, values in means.items()}
    return {**rounded, "auc": None if math.isnan(area) else round(area, 5)}, by_query


def matrices(run: metrics.Run, qrels: metrics.Qrels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Q, C) scores, relevance, and which of them are candidates."""
    width = max(1, max(map(len, run.values()), default=1))
    scores, relevance = np.zeros((len(run), width)), np.zeros((len(run), width))
    valid = np.zeros((len(run), width), dtype=bool)
    for row, (query, documents) in enumerate(run.items()):
        scores[row, : len(documents)] = list(documents.values())
        relevance[row, : len(documents)] = [qrels.get(query, {}).get(key, 0) for key in documents]
        valid[row, : len(documents)] = True
    return scores, relevance, valid


def reliability(run: metrics.Run, qrels: metrics.Qrels) -> dict[str, Any]:
    """`ece`, and `bins` of [pairs, mean probability, share that is relevant], of logits."""
    from mmembed.inference.reranking import probabilities

    logits, relevance, valid = matrices(run, qrels)
    found = metrics.calibration(probabilities(logits[valid]), relevance[valid], BINS)
    bins = zip(found.count.tolist(), found.probability.tolist(), found.relevant.tolist(), strict=True)
    kept = [[count, round(mean, 5), round(share, 5)] if count else [0, 0.0, 0.0] for count, mean, share in bins]
    return {"ece": None if math.isnan(found.error) else round(found.error, 5), "bins": kept}


def averages(results: dict[str, Any]) -> dict[str, Any]:
    """group -> the mean of each number over its sets (of a set the mean of its tasks), of the first stage and of each
    model; None where a model lacks a task. `all`: over all sets."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results["tasks"].values():
        groups.setdefault(entry["group"], []).append(entry)
    groups["all"] = list(results["tasks"].values())
    return {
        group: {
            "sets": len({entry["set"] for entry in entries}),
            "ceiling": _mean([(entry["set"], entry["ceiling"]) for entry in entries]),
            "first_stage": _means([(entry["set"], entry["first_stage"]) for entry in entries]),
            "scores": {
                model: _means([(entry["set"], entry["scores"][model]) for entry in entries])
                for model in results["models"]
            },
        }
        for group, entries in groups.items()
    }


def _means(scores: Sequence[tuple[str, dict[str, Any] | None]]) -> dict[str, Any] | None:
    if any(score is None for _, score in scores):
        return None
    there = [(name, score) for name, score in scores if score is not None]
    keys = [key for key in (*NAMES, "gain") if key in there[0][1]]
    return {key: _mean([(name, score[key]) for name, score in there]) for key in keys}


def _mean(values: Sequence[tuple[str, float | None]]) -> float | None:
    sets: dict[str, list[float]] = {}
    for name, value in values:
        if value is not None:
            sets.setdefault(name, []).append(value)
    if not sets:
        return None
    return round(sum(sum(own) / len(own) for own in sets.values()) / len(sets), 5)


if __name__ == "__main__":
    sys.exit(main())
