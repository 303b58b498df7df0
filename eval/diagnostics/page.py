"""One self-contained page of what the diagnostics found: drawn from `diagnostics.json` alone, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eval.tables import number
from mmembed.charts import differences, histogram, lines, page_environment, reliability

TEMPLATE = Path(__file__).with_name("page.html")
TEXTS = Path(__file__).with_name("texts.yaml")
COLOURS = ("after", "bm25", "minilm", "good")


def render(report: Mapping[str, Any]) -> str:
    """The page as one HTML document."""
    environment = page_environment()
    environment.filters |= {"figure": figure}
    said = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    entries = {**report["tasks"], "the model itself": report["model_itself"]}
    sections = [{"task": name, **_of(entry, said)} for name, entry in entries.items()
                if entry["found"] or entry["left_out"]]  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, sections=sections)


def figure(value: float | int | None) -> str:
    """Counts as they are, other numbers with three decimals."""
    return f"{value:,}" if isinstance(value, int) else number(value)


def _of(entry: Mapping[str, Any], said: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The cards of a task, and what does not apply to it."""
    cards = []
    for name, found in entry["found"].items():
        cards.append({**said[name], "numbers": found["numbers"], "lines": found["lines"],
                      "charts": [chart for chart in map(_chart, found["drawn"]) if chart["chart"]]})  # fmt: skip
    left_out = [(said[name]["title"], why) for name, why in entry["left_out"].items()]
    about = {key: entry[key] for key in ("documents", "queries", "rows", "fingerprint") if key in entry}
    return {"cards": cards, "left_out": left_out, "about": about}


def _chart(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates of a plot, and the colour of each of its parts."""
    kind = drawn["kind"]
    if kind in ("lines", "even"):
        series = {name: [(x, y) for x, y in points] for name, points in drawn["series"].items()}
        chart = lines(series, even=kind == "even")
        return {"kind": "lines", "chart": chart, "axis": drawn["axis"], "colours": _colours(series)}
    if kind == "histogram":
        chart = histogram(drawn["counts"], drawn["low"], drawn["high"])
        return {"kind": kind, "chart": chart, "axis": drawn["axis"], "colours": _colours(drawn["counts"])}
    if kind == "reliability":
        chart = reliability([(int(count), mean, share) for count, mean, share in drawn["bins"]])
        return {"kind": kind, "chart": chart, "axis": drawn["title"], "colours": {}}
    colours = {"above": "good", "below": "bad", "around": "before"}
    return {"kind": kind, "chart": differences(drawn["rows"]), "axis": drawn["axis"], "colours": colours}


def _colours(names: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(names, COLOURS, strict=False)) | ({"chance": "before"} if "chance" in names else {})
