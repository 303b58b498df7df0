"""Rankings as HTML: a column for each, a card for each hit, and marks that say what moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmembed.charts import page_environment
from mmembed.content import Image, Video, to_content
from mmembed.explore.comparison import Answer, Hit, Ranking
from mmembed.media import MediaStore
from mmembed.thumbnails import shortened, thumbnail

SIDE = 320  # pixels of a picture's longer side
PICTURES = 4  # of a document that are shown
LETTERS = 360  # of a document's text that are shown at once


def cards(answer: Answer, media: MediaStore) -> str:
    """The rankings of an answer beside each other.

    Args:
        media: opens the documents' pictures; one that cannot be opened is named instead.
    """
    pictures: dict[int, list[dict[str, str]]] = {}
    for hit in (hit for ranking in answer.rankings for hit in ranking.hits):
        if hit.row not in pictures:
            pictures[hit.row] = _pictures(hit.item, media)
    columns = [
        {
            "by": f"{ranking.against}, then {ranking.by}" if ranking.reranked else ranking.by,
            "about": _about(ranking, answer),
            "cards": [
                {
                    "rank": hit.rank,
                    "score": f"{hit.score:.3f}",
                    "id": hit.item["id"],
                    "pictures": pictures[hit.row],
                    "mark": _mark(hit, ranking, answer),
                    **_text(hit.item.get("text") or ""),
                }
                for hit in ranking.hits
            ],
        }
        for ranking in answer.rankings
    ]
    return _render(columns=columns, error=None)


def refusal(message: str) -> str:
    """An error in the place of rankings."""
    return _render(columns=[], error=message)


def _render(**values: Any) -> str:
    return page_environment().get_template("explore.html").render(**values)


def _pictures(item: Mapping[str, Any], media: MediaStore) -> list[dict[str, str]]:
    content = item.get("content", {key: item[key] for key in ("image", "images") if key in item})
    images: list[Image] = []
    for part in to_content(content) if content else ():
        images += [part] if isinstance(part, Image) else part.frames if isinstance(part, Video) else []
    return [{"name": str(image.source), "source": thumbnail(image, media, SIDE)} for image in images[:PICTURES]]


def _text(text: str) -> dict[str, str | None]:
    short = shortened(text, LETTERS)
    return {"text": short, "whole": text if short != text else None}


def _about(ranking: Ranking, answer: Answer) -> str:
    """What a ranking is, in a line."""
    if ranking.against is None:
        return "by cosine"
    apart = sum(_new(hit, answer) for hit in ranking.hits)
    if not ranking.reranked:
        return f"by cosine; shares {len(ranking.hits) - apart} of {len(ranking.hits)} with {ranking.against}"
    moved = sum(hit.rank != hit.other for hit in ranking.hits)
    return (
        f"the first {answer.depth} ordered anew: {moved} of {len(ranking.hits)} moved, "
        f"{apart} from below the first {answer.top_k}"
    )


def _new(hit: Hit, answer: Answer) -> bool:
    return hit.other is None or hit.other > answer.top_k


def _mark(hit: Hit, ranking: Ranking, answer: Answer) -> dict[str, str] | None:
    """How a hit stands in the ranking that its own is compared with."""
    if ranking.against is None:
        return None
    if hit.other is None:
        return {"kind": "new", "text": "only here", "title": f"not among the first {answer.depth} of {ranking.against}"}
    title = f"rank {hit.other} of {ranking.against}"
    if _new(hit, answer):
        text = f"was {hit.other}" if ranking.reranked else f"only here, {hit.other} there"
        return {"kind": "new", "text": text, "title": title}
    change = hit.other - hit.rank
    kind = "up" if change > 0 else "down" if change < 0 else "same"
    text = f"{'▲' if change > 0 else '▼'} {abs(change)}" if change else "="
    return {"kind": kind, "text": text, "title": title}
