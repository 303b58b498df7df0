"""Contrastive loss with terms that close the gap between two modalities ("It's Not a Modality Gap", arXiv 2405.18570).

L          = L_clip + L_uniform + L_xuniform + L_align
L_uniform  = 1/2 sum over x and y of log( 1/N sum_ij exp(-t |x_i - x_j|^2) )
L_xuniform = log( 1/N sum_{i != j} exp(-t |x_i - y_j|^2) )
L_align    = mean_i |x_i - y_i|^2

Over unit vectors x (queries) and y (positives) of N pairs; L_clip is InfoNCE both ways at a low temperature, and
L_uniform includes self-pairs. The normaliser 1/N (not 1/N^2) shifts values, not gradients. Pairs of one content do not
repel each other. Cost: (N, N) floats four times.

When: pictures and texts lie in two separate regions and a mixed index ranks one of them first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.alignment import distance, squared_distances
from mmembed.objectives.softmax import both_ways
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Above0, Weight


class ContrastiveGap(Aligned):
    """InfoNCE both ways and terms of uniformity and alignment (CUAXU); a weight of 0 leaves a term out.

    Args:
        temperature: of the contrastive term; 0.01, fixed, in the paper, which shows that low ones keep the gap.
        t: inverse width of the Gaussian potential (2, Wang and Isola).
        contrastive, uniform, cross_uniform, align: weights of the terms, 1 each in the paper.
    """

    name = "contrastive_gap"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        temperature: float | Mapping[str, Any] = 0.01,
        t: Above0 = 2.0,
        contrastive: Weight = 1.0,
        uniform: Weight = 1.0,
        cross_uniform: Weight = 1.0,
        align: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.temperature, self.t = Temperature(temperature), t
        self.weights = {"clip": contrastive, "uniform": uniform, "xuniform": cross_uniform, "align": align}
        if not any(self.weights.values()):
            raise ConfigError("objectives.contrastive_gap: all weights are 0; give one above 0")

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        terms = gap_terms(*pairs.unit, pairs.same, self.temperature.scale(), self.t)
        x, y = pairs.unit
        metrics = {name: value.detach() for name, value in terms.items()}
        metrics["centroid_distance"] = (x.mean(0) - y.mean(0)).norm().detach()
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum(), metrics


def gap_terms(x: Tensor, y: Tensor, same: Tensor, scale: Tensor | float, t: float = 2.0) -> dict[str, Tensor]:
    """Unit vectors (N, E) twice, (N, N) bool -> each term, unweighted.

    >>> x = torch.eye(2)
    >>> {name: round(value.item(), 3) for name, value in gap_terms(x, x, x.bool(), 1.0).items()}
    {'clip': 0.313, 'uniform': 0.018, 'xuniform': -4.0, 'align': 0.0}
    """
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    others = ~same | itself  # (N, N)
    uniform = (_potential(x, x, others, t) + _potential(y, y, others, t)) / 2
    return {
        "clip": both_ways(x @ y.T * scale, same).mean(),
        "uniform": uniform,
        "xuniform": _potential(x, y, ~same, t),
        "align": distance(x, y),
    }


def _potential(a: Tensor, b: Tensor, counted: Tensor, t: float) -> Tensor:
    """log( 1/N sum over the counted cells of exp(-t |a_i - b_j|^2) )."""
    floor = torch.finfo(a.dtype).min / 2
    exponents = (-t * squared_distances(a, b)).masked_fill(~counted, floor)  # (N, N)
    return exponents.flatten().logsumexp(0) - torch.log(torch.tensor(float(len(a)), device=a.device))
