"""One model on one task, as mteb runs it: its scores, the rows that they are made of, and what it ranked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from eval.models import Loaded
from eval.rows import DIGITS, NOWHERE, Found, Rows, agreeing, watching
from eval.stages import candidates_in
from eval.tasks.rows import RANKINGS, TaskRow


@dataclass(frozen=True)
class Scored:
    """What one evaluation gave.

    Attributes:
        numbers: `main`, its 95 % `interval`, the `seconds` it took, and all scores that mteb gives.
        rows: of the main score; None where it has none.
        ranked: of a benchmark that shows rankings, query -> its best documents (`eval.mteb_tasks.Ranked`).
        result: mteb's own, as a dictionary.
        found: of each part of a ranking what was found, for a second stage.
    """

    numbers: dict[str, Any]
    rows: Rows | None
    ranked: dict[str, Any] | None
    result: dict[str, Any]
    found: Found = field(default_factory=dict)


def score(
    model: Loaded,
    task: Any,
    row: TaskRow,
    *,
    split: str | None = None,
    candidates: Found | None = None,
    keeps_rankings: bool = False,
) -> Scored:
    """Evaluates a model.

    Args:
        task: of mteb, its data loaded.
        split: one of several; None: the mean of all. Subsets are averaged; a score of several parts has no interval.
        candidates: what a reranker orders in place of a task's own candidates; None: those.
        keeps_rankings: whether the task keeps the best documents of each query.
    """
    import mteb

    started = time.monotonic()
    batch = 16 if "frames" in row.modalities else 256  # of videos, whose frames are decoded together
    with candidates_in(task, candidates), watching(task) as (rows, found):
        outcome = mteb.evaluate(model.runner, task, cache=None, co2_tracker=False, show_progress_bar=False,
                                prediction_folder=NOWHERE,
                                encode_kwargs={"batch_size": batch, "show_progress_bar": False})  # fmt: skip
    by_split = outcome.task_results[0].scores
    parts = [scores for name in ([split] if split else by_split) for scores in by_split[name]]
    keys = [key for key, value in parts[0].items() if isinstance(value, float) and not key.startswith("nauc")]
    numbers = {key: sum(part[key] for part in parts) / len(parts) for key in keys}
    main = row.main_score
    own = agreeing(rows.get(parts[0]["hf_subset"]), numbers[main]) if len(parts) == 1 else None
    if own is not None and own.statistic == "mean":
        numbers[main] = own.score  # of all digits, where mteb's rankings have five
    numbers = {key: round(value, DIGITS) for key, value in numbers.items()}
    about = {"main": numbers[main], "interval": own and own.interval(),
             "seconds": round(time.monotonic() - started, 2)}  # fmt: skip
    ranked = dict(task.rankings) if keeps_rankings and row.kind in RANKINGS else None
    return Scored({**about, **numbers}, own, ranked, outcome.task_results[0].model_dump(mode="json"), found)


def sizes(task: Any, row: TaskRow) -> dict[str, int]:
    """How much a task holds: documents and queries, or rows."""
    from eval.sets import parts, splits

    tables = [data for part in parts(task) for data in splits(part)]
    if row.kind in RANKINGS:
        return {"documents": sum(len(data["corpus"]) for data in tables),
                "queries": sum(len(data["queries"]) for data in tables)}  # fmt: skip
    return {"rows": sum(map(len, tables))}
