"""report.json and report.html: the numbers of all sources, and a page with charts, samples and pictures in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.files import write_whole
from data_tools.inspection.contents import shown
from data_tools.inspection.statistics import Statistics
from mmembed.charts import histogram, page_environment
from mmembed.content import Document, Example, Image
from mmembed.data.records import content_to_json
from mmembed.media import MediaStore
from mmembed.thumbnails import thumbnail

TEMPLATE = Path(__file__).with_name("page.html")
OF_A_KIND = 2  # documents of a sample that are shown, positives and negatives each


def samples(statistics: Statistics) -> list[dict[str, Any]]:
    """The sampled records as JSON."""
    return [_plain(example) for example in statistics.shown.items()]


def write_report(
    output: Path,
    title: str,
    entries: Sequence[dict[str, Any]],
    statistics: Sequence[Statistics],
    exploration: Mapping[str, Any] | None,
) -> None:
    """Writes report.json and report.html.

    Args:
        entries: of `Statistics.as_dict`, each with `use` where a config was given.
    """
    report = {"title": title, "sources": list(entries), "exploration": exploration}
    write_whole(output / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    environment = page_environment()
    environment.filters |= {"number": _number, "percent": _percent, "first_of": _first_of}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        sources=[_for_page(entry, one) for entry, one in zip(entries, statistics, strict=True)],
        exploration=exploration,
        uses=any("use" in entry for entry in entries),
    )
    write_whole(output / "report.html", page.encode("utf-8", errors="replace"))


def _for_page(entry: Mapping[str, Any], statistics: Statistics) -> dict[str, Any]:
    """The entry with its charts and pictures."""
    sides = {
        name: {
            **entry[name],
            "twins": _twins(entry[name], statistics.media),
            "most_repeated": [
                {**one, "thumbnail": one["picture"] and thumbnail(Image(one["picture"]), statistics.media)}
                for one in entry[name]["most_repeated"]
            ],
        }
        for name in ("queries", "documents") if entry[name]
    }  # fmt: skip
    charts = {
        **{name: _chart(side["characters"]) for name, side in sides.items()},
        "relevance": _chart(entry["relevance"]),
        "scores": _chart(entry["scores"]),
    }
    examples = [_example(one, statistics.media) for one in statistics.shown.items()]
    return {"use": None, **entry, **sides, "charts": charts, "examples": examples}


def _chart(counted: Mapping[str, Any]) -> dict[str, Any] | None:
    bins = counted["bins"]
    return None if bins is None else histogram(counted["histogram"], bins[0], bins[-1])


def _twins(side: Mapping[str, Any], media: MediaStore) -> list[list[str]]:
    groups = side["near_duplicate_pictures"]["shown"]
    return [[thumbnail(Image(one["picture"]), media) for one in group] for group in groups]


def _example(example: Example, media: MediaStore) -> dict[str, Any]:
    chosen = _chosen(example)
    documents = [
        {"relevance": one.relevance, "score": one.score, "content": shown(one.content, media)} for one in chosen
    ]
    return {
        "where": example.where,
        "instruction": example.instruction,
        "query": shown(example.query, media),
        "documents": documents,
        "more": len(example.documents) - len(chosen),
    }


def _plain(example: Example) -> dict[str, Any]:
    documents = [
        {"content": content_to_json(one.content), "relevance": one.relevance, "score": one.score}
        for one in _chosen(example)
    ]
    return {"where": example.where, "query": content_to_json(example.query), "documents": documents}


def _chosen(example: Example) -> list[Document]:
    positives = [one for one in example.documents if one.relevance > 0]
    negatives = [one for one in example.documents if one.relevance <= 0]
    return positives[:OF_A_KIND] + negatives[:OF_A_KIND]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _first_of(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The most frequent ones, and what is left of the others together."""
    rest = sum(islice(counts.values(), most, None))
    return dict(islice(counts.items(), most)) | ({"others": rest} if rest else {})
