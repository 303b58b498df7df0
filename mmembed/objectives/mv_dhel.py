"""More than two views, with alignment and uniformity decoupled: positives are in no denominator.

L = mean_i ( sum_v log sum_{j != i} e^{z_iv.z_jv / tau} - log sum_{v != w} e^{z_iv.z_iw / tau} )

(MV-DHEL, arXiv 2507.06979.) Each view is spread over the sphere among its own kind, so different modalities need not
repel each other. The numerator counts ordered pairs of views, as the formula is printed; the released code counts
unordered ones, a difference of log 2 in the value and none in the gradient. Pairs of one content are no negatives; a
sample without another one has no loss. Cost: (V, N, N) floats.

When: a sample has three views or more of different modalities, which should not repel each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.temperature import Temperature


class MVDHEL(Aligned):
    """Views of a sample attract, samples repel within each view.

    Args:
        temperature: 0.5, of the authors' examples.
        views: of a sample, the query among them; the others are its positives in order.
    """

    name = "mv_dhel"
    least_pairs = 2
    contrasts = True

    def __init__(self, temperature: float | Mapping[str, Any] = 0.5, views: Annotated[int, Field(ge=2)] = 3) -> None:
        super().__init__()
        self.temperature, self.positives_needed = Temperature(temperature), views - 1

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        together, apart = decoupled(pairs.unit_views, pairs.same, self.temperature.scale())
        metrics = {"attraction": together.mean().detach(), "repulsion": apart.mean().detach()}
        return (apart - together).mean(), metrics


def decoupled(views: Tensor, same: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Unit vectors (V, N, E), (N, N) bool -> (N,) numerators and (N,) denominators, as logarithms.

    >>> [part.tolist() for part in decoupled(torch.eye(2).expand(3, -1, -1), torch.eye(2).bool(), 0.0)]
    [[1.7917594909667969, 1.7917594909667969], [0.0, 0.0]]
    """
    floor = torch.finfo(views.dtype).min / 2
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    own = torch.einsum("vne,wne->nvw", views, views) * scale  # (N, V, V)
    together = own.masked_fill(itself, floor).flatten(1).logsumexp(1)  # (N,)
    scores = views @ views.mT * scale  # (V, N, N)
    has_other = (~same).any(1)  # (N,)
    apart = scores.masked_fill(same, floor).logsumexp(2).sum(0)  # (N,)
    return together * has_other, torch.where(has_other, apart, 0.0)
