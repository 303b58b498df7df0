"""The page of a training run, `training_report.html`: its loss, its health, its warnings, from the trainer's own log.

One file that fetches nothing, written again with each checkpoint and at the end; a pure function of
`trainer_state.json`, so the page of any old run can be made anew. Costs a few milliseconds a thousand logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmembed.charts import curve, page_environment
from mmembed.training.health import NORM, judge

PAGE = "training_report.html"
CHARTS = {  # key of the log -> (title, what it says)
    "loss": ("Loss", "Mean over the logged steps. Equal scores would give the value at chance."),
    "loss_at_chance": ("Loss at chance", "Of equal scores: what the loss has to stay below."),
    "accuracy": ("Accuracy", "Share of queries whose best candidate is relevant."),
    "score_gap": ("Score gap", "Positive minus negative similarity. Should grow; at 0 nothing is told apart."),
    "positive_similarity": ("Positive similarity", "Mean over positive pairs."),
    "negative_similarity": ("Negative similarity", "Mean over negatives. Close to the positives' means collapse."),
    "alignment": ("Alignment", "Mean squared distance of positive pairs. Lower is closer."),
    "uniformity": ("Uniformity", "Lower is more spread out: 0 is one point, -4 is free directions."),
    "effective_rank": ("Effective rank", "Directions that the vectors of a batch really use."),
    "modality_gap": ("Modality gap", "Distance of the centroids of inputs with and without pictures."),
    "duplicate_rate": ("Duplicates", "Share of a batch's documents that repeat another one."),
    "masked_known_positive": ("Masked: known positives", "Share of cells that are positives of the query elsewhere."),
    "masked_duplicate": ("Masked: duplicates", "Share of cells that repeat the query or answer its twin."),
    "masked_margin": ("Masked: margin", "Share of cells above the best positive and the margin."),
    "temperature": ("Temperature", "Learned."),
    "learning_rate": ("Learning rate", ""),
    "loss_scale": ("Loss scale", "Of fp16: halved where a gradient overflows, whose step is dropped."),
    "pairs_per_second": ("Pairs a second", "Of all processes."),
    "chunk_tokens": ("Tokens a chunk", "Halved when memory ran out."),
}


def write_report(folder: str | Path, history: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page of a log into a run's folder; returns its path."""
    page = Path(folder, PAGE)
    page.write_text(render(history, Path(folder).name), encoding="utf-8")
    return page


def render(history: Sequence[Mapping[str, Any]], name: str) -> str:
    """The page as one HTML document."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    titles = dict(CHARTS)
    titles |= {
        key: (f"Gradient norm: {key.removeprefix(NORM)}", "Before clipping.") for key in keys if key.startswith(NORM)
    }
    titles |= {
        key: (key.removeprefix("eval_"), "Of dev sources, or a benchmark's task.")
        for key in keys
        if key.startswith("eval_")
    }
    charts = []
    for key, (title, text) in titles.items():
        points = _points(history, key)
        chart = curve(points, width=420, height=190) if key not in ("epoch", "eval_seconds") else None
        if chart is not None and any(value != points[0][1] for _, value in points):
            charts.append({"title": title, "text": text, "chart": chart, "value": f"{points[-1][1]:.4g}"})
    steps = [int(entry["step"]) for entry in history if "loss" in entry]
    return (
        page_environment()
        .get_template("training.html")
        .render(
            name=name,
            charts=charts,
            constants=_constants(history, titles),
            findings=judge(history),
            first=steps[0] if steps else 0,
            last=steps[-1] if steps else 0,
            logs=len(steps),
            loss=_ends(history, "loss"),
            gap=_ends(history, "score_gap"),
        )
    )


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values."""
    found = [(float(entry["step"]), entry[key]) for entry in history if key in entry and "step" in entry]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def _ends(history: Sequence[Mapping[str, Any]], key: str) -> tuple[str, str] | None:
    points = _points(history, key)
    return (f"{points[0][1]:.3g}", f"{points[-1][1]:.3g}") if points else None


def _constants(history: Sequence[Mapping[str, Any]], titles: Mapping[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """(title, value) of what never changed: a chart of it would say nothing."""
    found = []
    for key, (title, _) in titles.items():
        values = {value for _, value in _points(history, key)}
        if len(values) == 1 and key not in ("epoch", "eval_seconds"):
            found.append((title, f"{values.pop():.4g}"))
    return found
