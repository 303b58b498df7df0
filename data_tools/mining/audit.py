"""What was mined, to judge before training on it: report.json and report.html beside the records.

A negative is suspected to be false where a judge scores it at least as high as the lowest of its query's positives;
every one that is written is judged. The judge is the teacher; without one it is the retriever. Where the rules chose by
the judge's scores, too, it only says what they let through, and the page says so. The page is one file: charts are SVG,
pictures are inlined as small JPEGs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.files import write_whole
from data_tools.mining.collection import Collection
from data_tools.mining.retrievers import Item
from data_tools.mining.settings import MiningConfig
from data_tools.mining.steps import Mined
from mmembed.charts import histogram, page_environment
from mmembed.content import Image, Video, to_content
from mmembed.media import MediaStore
from mmembed.thumbnails import shortened, thumbnail

TEMPLATE = Path(__file__).with_name("report_template.html")
TEXT = 280  # characters of a text that is shown
SHOWN = 4  # pictures a content
SAMPLES = 4  # of all that was mined, spread over the queries
BINS = 40
PERCENTILES = (5, 25, 50, 75, 95)
Floats = NDArray[np.float32]


def audit(
    config: MiningConfig, title: str, found: Collection, mined: Mined, media: MediaStore, written: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a source in report.json; `shown` and `sampled` hold examples with pictures, for the page alone."""
    there = mined.negatives >= 0
    judged, known_judged = mined.judged, mined.known_judged
    judge = "teacher" if judged is not None else "retriever"
    negative_judged, known = (mined.scores, mined.known_scores) if judged is None else (judged, known_judged)
    assert known is not None, "a judge scores positives, too"
    gap = negative_judged - mined.least(known)[:, None]  # (Q, K) >= 0: suspected
    suspected = there & (gap >= 0)
    own_gap = (mined.scores - mined.least(mined.known_scores)[:, None])[there]
    ranks = mined.ranks[there & (mined.ranks >= 0)]
    least_sure = np.where(suspected, gap, -np.inf)
    worst = np.argsort(-least_sure.max(axis=1), kind="stable")[: config.examples]  # the worst one of a query
    shown = [(query, int(least_sure[query].argmax())) for query in worst.tolist() if suspected[query].any()]
    examples = [_example(found, mined, query, place, negative_judged, known) for query, place in shown]
    samples = [
        _example(found, mined, query, int(there[query].argmax()), negative_judged, known)
        for query in _spread_out(there)
    ]
    right = (mined.known >= 0) & (np.arange(mined.known.shape[1]) < mined.positives)  # (Q, P + B)
    return {
        "source": title,
        **{key: found.summary[key] for key in ("records", "queries", "documents")},
        "skipped": found.summary["skipped"],
        "duplicates": {
            "removed": found.summary["duplicates"], "examples": found.summary["duplicate_examples"],
            "negatives_left_out": found.summary["left_out"],
        },
        "negatives": {
            "written": written["negatives"], "chosen": int(there.sum()), "records_short": written["short"],
            "records_without": written["none"], "random": int(mined.filled.sum()),
        },
        "removed": mined.removed,
        "clusters": mined.clusters,
        "scores": _compared(mined.known_scores[right], mined.scores[there]),
        "teacher_scores": None if judged is None or known_judged is None
        else _compared(known_judged[right], judged[there]),
        "hardness": {
            "gap_to_positive": _spread(-own_gap),
            "above_positive": _share(own_gap[np.isfinite(own_gap)] >= 0),
            "rank": _spread(ranks + 1),
            "positive_first": _share(mined.least(mined.known_scores) > mined.first),
        },
        "false_negatives": {
            "judge": judge, "judge_chose": judged is None or config.rescore == "candidates",
            "judged": int(there.sum()), "suspected": int(suspected.sum()),
            "rate": _share(suspected[there]), "queries": int(suspected.any(axis=1).sum()),
            "examples": [_plain(one) for one in examples],
        },
        "samples": [_plain(one) for one in samples],
        "shown": [_pictured(one, media) for one in examples],
        "sampled": [_pictured(one, media) for one in samples],
    }  # fmt: skip


def write_report(config: MiningConfig, sources: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes report.json and report.html."""
    plain = [{key: value for key, value in source.items() if key not in ("shown", "sampled")} for source in sources]
    settings = config.model_dump(mode="json", include={"retriever", "search", "rules", "teacher", "negatives", "seed"})
    report = {"settings": settings, "sources": plain}
    write_whole(output / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    environment = page_environment()
    environment.filters |= {"number": _number, "percent": _percent}
    charts = [
        {key: histogram(one["counts"], one["bins"][0], one["bins"][-1])
         for key, one in ((key, source[key]) for key in ("scores", "teacher_scores")) if one and one["bins"]}
        for source in sources
    ]  # fmt: skip
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sources=sources,
        charts=charts,
        settings={key: json.dumps(value) for key, value in settings.items()},
        total=_total(plain),
    )
    write_whole(output / "report.html", page.encode())


def _total(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    judged = sum(one["false_negatives"]["judged"] for one in sources)
    suspected = sum(one["false_negatives"]["suspected"] for one in sources)
    return {
        "records": sum(one["records"] for one in sources),
        "negatives": sum(one["negatives"]["written"] for one in sources),
        "rate": suspected / judged if judged else None,
    }


def _example(found: Collection, mined: Mined, query: int, place: int, judged: Floats, known: Floats) -> dict[str, Any]:
    """A query, the positive that its judge scores lowest, and a negative."""
    row = int(mined.negatives[query, place])
    own = np.where(mined.known[query, : mined.positives] >= 0, known[query, : mined.positives], np.inf)
    positive = int(np.argmin(own))
    items = found.items("corpus", [int(mined.known[query, positive]), row])
    return {
        "query": found.items("queries", [query])[0],
        "positive": items[0], "positive_score": float(own[positive]),
        "negative": items[1], "negative_score": float(judged[query, place]), "rank": int(mined.ranks[query, place]) + 1,
    }  # fmt: skip


def _spread_out(there: NDArray[np.bool_]) -> list[int]:
    """Some queries with negatives, at equal distances."""
    queries = np.flatnonzero(there.any(axis=1))
    places = np.linspace(0, len(queries) - 1, min(SAMPLES, len(queries))).astype(np.int64)
    return queries[places].tolist()


def _plain(example: dict[str, Any]) -> dict[str, Any]:
    named = {"content": lambda item: item.content, "id": lambda item: item.id, "where": lambda item: item.where}
    return {
        key: {name: get(value) for name, get in named.items()} if isinstance(value, Item) else round(value, 6)
        for key, value in example.items()
    }


def _pictured(example: dict[str, Any], media: MediaStore) -> dict[str, Any]:
    return {key: _shown(value, media) if isinstance(value, Item) else value for key, value in example.items()}


def _shown(item: Item, media: MediaStore) -> dict[str, Any]:
    images = []
    for part in to_content(item.content):
        images += list(part.frames) if isinstance(part, Video) else [part] if isinstance(part, Image) else []
    pictures = [thumbnail(one, media) for one in images[:SHOWN]]
    return {"text": shortened(item.text, TEXT), "id": item.id or item.where, "pictures": pictures}


def _compared(positives: NDArray[Any], negatives: NDArray[Any]) -> dict[str, Any]:
    """Both spreads, and counts in the bins of one histogram."""
    series = {"positives": positives, "negatives": negatives}
    series = {name: values[np.isfinite(values)].astype(np.float64) for name, values in series.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), BINS)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in series.items()}
    found: dict[str, Any] = {name: _spread(values) for name, values in series.items()}
    return {**found, "bins": [round(float(edge), 6) for edge in edges], "counts": counts}


def _spread(values: NDArray[Any]) -> dict[str, Any]:
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return {"count": 0, "mean": None, "percentiles": None}
    return {
        "count": int(values.size), "mean": round(float(values.mean()), 6),
        "percentiles": {str(one): round(float(np.percentile(values, one)), 6) for one in PERCENTILES},
    }  # fmt: skip


def _share(values: NDArray[np.bool_]) -> float | None:
    return round(float(values.mean()), 6) if values.size else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
