"""InfoNCE of more than two views in one term: one log-ratio a sample, not one a pair of views.

L = -mean_i log( sum_{v != w} e^{z_iv.z_iw / tau} / sum_{v, (j, w) counted} e^{z_iv.z_jw / tau} )

(arXiv 2507.06979, README of the authors' code.) What the denominator counts: `cross` views other than v of all samples,
as the formula is printed; `all` views of all samples but (i, v) itself, as the code that the authors released does.
Pairs of one content are no negatives. Cost: (V N, V N) floats.

When: a sample has three views or more, one ratio for all instead of one a pair of views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.temperature import Temperature


class MVInfoNCE(Aligned):
    """All views of a sample against all views of all samples.

    Args:
        temperature: 0.5, of the authors' examples.
        views: of a sample, the query among them; the others are its positives in order.
        denominator: `cross` (the formula) or `all` (the released code, which sets views of one kind apart as well).
    """

    name = "mv_infonce"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        temperature: float | Mapping[str, Any] = 0.5,
        views: Annotated[int, Field(ge=2)] = 3,
        denominator: Literal["cross", "all"] = "cross",
    ) -> None:
        super().__init__()
        self.temperature, self.denominator, self.positives_needed = Temperature(temperature), denominator, views - 1

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = ratios(pairs.unit_views, pairs.same, self.temperature.scale(), self.denominator == "cross")
        return -ratio.mean(), {"positive_share": ratio.exp().mean().detach()}


def ratios(views: Tensor, same: Tensor, scale: Tensor | float, cross_only: bool = True) -> Tensor:
    """Unit vectors (V, N, E), (N, N) bool -> (N,), the logarithm of the share of each sample's own views.

    >>> ratios(torch.eye(2).expand(2, -1, -1), torch.eye(2).bool(), 1.0)  # log(e / (e + 1))
    tensor([-0.3133, -0.3133])
    """
    kinds, count = len(views), views.shape[1]
    own = torch.einsum("vne,wne->nvw", views, views) * scale  # (N, V, V)
    scores = torch.einsum("vie,wje->ivjw", views, views) * scale  # (N, V, N, V)
    itself = torch.eye(count, dtype=torch.bool, device=views.device)
    other_view = ~torch.eye(kinds, dtype=torch.bool, device=views.device)
    positive = itself[:, None, :, None] & other_view[None, :, None, :]  # (N, V, N, V)
    negative = (~same)[:, None, :, None] & (other_view if cross_only else torch.ones_like(other_view))[:, None, :]
    return _sum(own, other_view.expand_as(own)) - _sum(scores, positive | negative)


def _sum(scores: Tensor, counted: Tensor) -> Tensor:
    """log sum exp over all cells of a sample that count, (N,)."""
    floor = torch.finfo(scores.dtype).min / 2
    return scores.masked_fill(~counted, floor).flatten(1).logsumexp(1)
