"""What a main score is made of, row by row, caught while mteb computes it: intervals and paired tests live on this.

    retrieval, reranking   query id -> the main score of that query
    classification         row number -> share of mteb's experiments that name its label
    sentence pairs         row number -> [cosine, what people said]

Kept is only what gives mteb's own number again: where it does not (a metric of another shape, ids that mteb drops),
or where a score is of no rows (V-measure of a clustering), a task has no rows, so no interval. They are written beside
the results, `results.json` -> `results.rows.json`, which stays small. Cost: sorting what was found, once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.files import write_json
from eval.significance import Statistic, interval, score
from mmembed import metrics

TOLERANCE = 1e-4  # mteb rounds to five decimals
DIGITS = 9  # of what is written
NOWHERE = Path("predictions")  # mteb hands predictions over where a folder is named; they are caught, none is made
Values = dict[str, float | list[float]]  # row -> its score, or what is correlated
Found = dict[tuple[str, str], dict[str, dict[str, float]]]  # of a subset and a split: query -> document -> score

BY_QUERY: dict[str, Callable[[metrics.Floats, metrics.Floats, int], metrics.Floats]] = {
    "ndcg": lambda ranked, judged, k: metrics.ndcg_at_k(ranked, judged, k),
    "map": lambda ranked, judged, k: metrics.average_precision_at_k(ranked, judged, k),
    "recall": lambda ranked, judged, k: metrics.recall_at_k(ranked, judged, k),
    "precision": lambda ranked, judged, k: metrics.precision_at_k(ranked, k),
    "mrr": lambda ranked, judged, k: metrics.reciprocal_rank_at_k(ranked, k),
    "hit_rate": lambda ranked, judged, k: metrics.hit_at_k(ranked, k),
}  # what stands before `_at_k` in mteb's names


@dataclass(frozen=True)
class Rows:
    """The rows of one score."""

    statistic: Statistic
    values: Values

    @property
    def score(self) -> float:
        return score(list(self.values.values()), self.statistic)

    def interval(self) -> list[float] | None:
        """The 95 % interval of the score; None where there is none."""
        bounds = interval(list(self.values.values()), self.statistic)
        return None if bounds is None else [round(bound, 5) for bound in bounds]


@contextmanager
def watching(task: Any) -> Iterator[tuple[dict[str, Rows], Found]]:
    """Of an mteb task that is evaluated inside, filled as they come: subset -> rows of the main score, and what was
    found of a ranking."""
    from mteb.abstasks import AbsTaskRetrieval

    caught: dict[str, Rows] = {}
    runs: Found = {}
    ranks = isinstance(task, AbsTaskRetrieval)
    specific: Any = task.task_specific_scores if ranks else None  # gets what is left where mteb drops documents

    def ranked(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
        runs[hf_subset, hf_split] = results
        found = of_ranking(task.metadata.main_score, results, qrels)
        if found is not None:
            caught[hf_subset] = found
        return specific(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    def predicted(predictions: Any, model: Any, folder: Path, hf_split: str, hf_subset: str) -> None:
        data = task.dataset[hf_split] if hf_split in task.dataset else task.dataset[hf_subset][hf_split]
        found = of_predictions(task, predictions, data)
        if found is not None:
            caught[hf_subset] = found

    replaced = {"_save_task_predictions": predicted} | ({"task_specific_scores": ranked} if ranks else {})
    vars(task).update(replaced)
    try:
        yield caught, runs
    finally:
        for name in replaced:
            del vars(task)[name]


def of_ranking(main_score: str, run: metrics.Run, qrels: metrics.Qrels) -> Rows | None:
    """The main score of each query of what was found; None where it is no metric of `BY_QUERY`."""
    kind, _, cut = main_score.partition("_at_")
    if kind not in BY_QUERY or not cut.isdigit() or not run:
        return None
    ranked, judged = metrics.rank_run(run, qrels)
    values = BY_QUERY[kind](ranked, judged, int(cut))  # (Q,)
    return Rows("mean", dict(zip(run, (round(value, DIGITS) for value in values.tolist()), strict=True)))


def of_predictions(task: Any, predictions: Any, data: Any) -> Rows | None:
    """Rows of a correlation of cosines or of an accuracy; None for another main score."""
    main_score = task.metadata.main_score
    if main_score == "cosine_spearman":
        columns = zip(predictions["cosine_scores"], data["score"], strict=True)
        return Rows("spearman", _numbered([[round(float(ours), DIGITS), float(theirs)] for ours, theirs in columns]))
    if main_score == "accuracy" and isinstance(predictions, list):
        labels = np.asarray(data[task.label_column_name])
        right = np.mean([np.asarray(one) == labels for one in predictions], axis=0)  # (N,)
        return Rows("mean", _numbered([round(share, DIGITS) for share in right.tolist()]))
    return None


def agreeing(rows: Rows | None, main: float) -> Rows | None:
    """The rows, where their score is the one that mteb gives."""
    return rows if rows is not None and abs(rows.score - main) < TOLERANCE else None


@dataclass
class Kept:
    """What a run keeps beside its results: rows, and mteb's own files.

    Attributes:
        output: the results file, beside which rows are written; None: nowhere.
        mteb: a folder for results as mteb writes them; None: none.
    """

    output: Path | None = None
    mteb: Path | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, task: str, model: str, rows: Rows | None) -> None:
        if rows is not None:
            entry = self.tasks.setdefault(task, {"statistic": rows.statistic, "scores": {}})
            entry["scores"][model] = rows.values

    def add_mteb(self, meta: Any, result: Mapping[str, Any]) -> None:
        """A result in mteb's layout, below model and fingerprint; a task is a file there, so its name loses slashes.

        Args:
            meta: mteb's of the model. result: mteb's, as a dictionary.
        """
        if self.mteb is not None:
            from mteb.cache import ResultCache
            from mteb.results import TaskResult

            told = {**result, "task_name": result["task_name"].replace("/", "-")}
            ResultCache(self.mteb).save_to_cache(TaskResult.model_validate(told), meta)

    def write(self) -> None:
        if self.output is not None:
            write_json(rows_file(self.output), {"tasks": self.tasks}, indent=None)


def rows_file(results: Path) -> Path:
    """Where the rows of a results file are: `x/results.json` -> `x/results.rows.json`."""
    return results.with_suffix(".rows.json")


def _numbered(values: Sequence[Any]) -> Values:
    return {str(number): value for number, value in enumerate(values)}
