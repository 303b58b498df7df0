"""The page of a run: averages, each task with its intervals, and what came first for some queries.

Of each ranking three queries are shown: the two that went worst for the first model, by the task's main score, and one
that is drawn by a hash of its id. The page is one file that fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.examples import SHOWN, Examples
from eval.rerank_report import short_names
from eval.summary import notes
from eval.tables import number, reach
from mmembed.charts import page_environment

TEMPLATE = Path(__file__).with_name("run_template.html")
WORST, DRAWN, SIDES = 2, 1, 2  # queries of a task that went worst, that are drawn; models whose documents are shown
COLOURS, RELEVANT = 5, 2  # relevant documents of a query that are shown


def examples(
    task: str, data: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], scores: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Some queries of a ranking with the first documents of the first two models, and what they should have found.

    Args:
        data: of the mteb task.
        found: model -> `rankings` of the task.
        scores: query -> main score of the first model; without one a query counts as no bad one.
    """
    if not found:
        return []
    sides = dict(list(found.items())[:SIDES])
    (first, *_), picker = sides.values(), Examples(data)
    order = [query for query in picker.drawn() if query in first]
    worst = [query for query in sorted(order, key=lambda one: scores.get(one, 1.0)) if scores.get(query, 1.0) < 1]
    chosen = dict.fromkeys(worst[:WORST], "went worst")
    chosen |= dict.fromkeys([one for one in order if one not in chosen][:DRAWN], "drawn")
    shown = []
    for query, why in chosen.items():
        tops = {name: [key for key, _ in own.get(query, {"top": []})["top"][:SHOWN]] for name, own in sides.items()}
        tops["judged relevant"] = first[query]["relevant"][:RELEVANT]
        score = f", {scores[query]:.3f}" if query in scores else ""
        shown.append({"task": f"{task}, {why}{score}", **picker.of(query, tops)})
    return shown


def render(results: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    """The page as one HTML document.

    Args:
        shown: of `examples`.
    """
    environment = page_environment()
    environment.filters |= {"number": number, "reach": reach}
    groups = [
        {"name": group, "means": means,
         "rows": {name: one for name, one in results["tasks"].items() if one["group"] == group}}
        for group, means in results["averages"].items()
    ]  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results, groups=groups, examples=shown, shown=short_names(results), colours=COLOURS,
        places={model: place for place, model in enumerate(results["models"])},
        notes=[line.strip() for line in notes(results) if line],
    )  # fmt: skip
