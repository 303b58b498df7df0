"""The documents as points of a plane: the two directions in which their vectors differ most (PCA).

Points that are far apart here are far apart; points that are close here may not be, because two directions show a part
of the variance only, which the page states. Cost: M x E numbers for M points, at most `SAMPLE`, and a second.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmembed.explore.comparison import Hit
from mmembed.explore.sides import Side
from mmembed.search.vectors import Rows
from mmembed.thumbnails import shortened

SAMPLE = 5000  # points that a browser draws and moves without a delay
CROWD = 1000  # points that are drawn smaller
HOVER = 48  # letters in a line of a point's text
GREY, BLUE, ORANGE = "#8b98a5", "#0b7fab", "#d9822b"  # seen on white and on black


@dataclass(frozen=True)
class Projection:
    """A plane, and the documents drawn on it.

    Attributes:
        rows: (M,) rows of the documents that are drawn, rising.
        points: (M, 2) their places.
        mean, axes: (E,) and (2, E): a vector v lies at axes (v - mean).
        shown: share of the variance that the plane shows, 0 to 1.
        total: documents in all.
    """

    rows: NDArray[np.int64]
    points: NDArray[np.float32]
    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    shown: float
    total: int

    def place(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, E) -> (n, 2)."""
        return np.asarray((vectors - self.mean) @ self.axes.T, np.float32)

    @property
    def title(self) -> str:
        """What is drawn, in words."""
        drawn = f"{self.total:,} documents"
        if len(self.rows) < self.total:
            drawn = f"{len(self.rows):,} of {self.total:,} documents, drawn at random"
        return f"{drawn}; two directions (PCA) show {100 * self.shown:.0f} % of the variance"


def project(side: Side, limit: int = SAMPLE, seed: int = 0) -> Projection:
    """The plane of a model's vectors, of `limit` documents drawn at random where there are more."""
    from sklearn.decomposition import PCA

    total = len(side.vectors)
    rows = np.arange(total)
    if total > limit:
        rows = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
    vectors = Rows(side.vectors, "cosine", "corpus", side.size).take(rows, checked=True)  # (M, E)
    axes, shown = np.zeros((2, vectors.shape[1]), np.float32), 1.0
    if (vectors != vectors[0]).any():
        count = min(2, *vectors.shape)
        pca = PCA(count, svd_solver="full" if len(rows) < 2 * count else "randomized", random_state=seed).fit(vectors)
        axes[:count], shown = pca.components_, float(pca.explained_variance_ratio_.sum())
    mean = vectors.mean(axis=0)
    return Projection(rows, (vectors - mean) @ axes.T, mean, axes, shown, total)


def figure(
    projection: Projection,
    side: Side,
    items: Mapping[int, Mapping[str, Any]],
    hits: Sequence[Hit] = (),
    query: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """The plane as a figure of plotly.js: documents, and on them the query and the hits with their ranks.

    Args:
        items: of the rows of the projection.
        query: (E,) the question's vector.
    """
    traces = [
        _trace(
            projection.points,
            [_hover(items[int(row)]) for row in projection.rows],
            name="documents",
            marker={"color": GREY, "size": 6 if len(projection.rows) < CROWD else 4, "opacity": 0.55},
        )
    ]
    if query is not None:
        marker = {"color": ORANGE, "size": 24, "symbol": "star", "line": {"color": "#ffffff", "width": 1}}
        traces.append(_trace(projection.place(_unit(query)), ["the query"], name="query", marker=marker))
    if hits:
        hits = hits[::-1]  # the best is drawn last, above the others
        vectors = Rows(side.vectors, "cosine", "corpus", side.size).take(np.array([hit.row for hit in hits]))
        traces.append(
            _trace(
                projection.place(vectors),
                [f"{hit.rank}. {_hover(hit.item)}" for hit in hits],
                name="found",
                mode="markers+text",
                text=[str(hit.rank) for hit in hits],
                textfont={"color": "#ffffff", "size": 10},
                marker={"color": BLUE, "size": 17, "line": {"color": "#ffffff", "width": 1}},
            )
        )
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    layout = {
        "height": 460,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY, "family": "system-ui, sans-serif"},
        "legend": {"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#16202c", "bordercolor": GREY, "font": {"color": "#ffffff"}, "align": "left"},
        "dragmode": "pan",
        "xaxis": bare,
        "yaxis": bare,
    }
    return {"data": traces, "layout": layout, "config": {"displayModeBar": False, "scrollZoom": True}}


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """(E,) -> (1, E) of length 1, as the documents are."""
    rows: NDArray[np.float32] = Rows(vector[None], "cosine", "queries", None).read(0, 1)
    return rows


def _trace(points: NDArray[np.float32], hover: Sequence[str], **looks: Any) -> dict[str, Any]:
    x, y = (np.round(points[:, axis].astype(float), 4).tolist() for axis in (0, 1))
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": y,
        "hovertext": list(hover),
        "hoverinfo": "text",
        **looks,
    }


def _hover(item: Mapping[str, Any]) -> str:
    """Name and beginning of a document as lines of plotly's HTML."""
    pictures = [one for one in [item.get("image"), *item.get("images", [])] if one]
    lines = [item["id"], *(f"[{one}]" for one in pictures[:1] if one != item["id"])]
    lines += textwrap.wrap(shortened(item.get("text") or "", 4 * HOVER), HOVER)
    return "<br>".join(escape(line, quote=False) for line in lines)
