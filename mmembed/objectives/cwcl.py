"""Continuously weighted contrastive loss: how much two samples are alike in one modality is the target in both.

L = -1/N sum_i 1 / (sum_j w_ij) sum_j w_ij log softmax_j(u_i.v_j / tau),  w_ij = ((1 + cos(a_i, a_j)) / 2)^sharpness

(arXiv 2309.14580; the equation is from memory of the paper.) a are the vectors of the anchor modality, whose tower is
frozen there; here they never get a gradient through w. `reverse` averages with plain InfoNCE from v to u (our reading).
An encoder whose vectors lie in a narrow cone makes all w nearly 1 and the target nearly uniform: watch the logged
`weight_entropy` (share of that of equal weights), and raise `sharpness`. Cost: (N, N) floats three times.

When: a tower is frozen and good: what it finds alike is a graded target for the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import info_nce
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Above0


class CWCL(Aligned):
    """The similarity of all samples in one modality is the target of the contrast.

    Args:
        temperature: 0.07 (CLIP's start).
        anchors: the side whose similarities are the weights; freeze its tower as the paper does.
        reverse: average with plain InfoNCE from positives to queries.
        sharpness: exponent of the weights, 1 in the paper.
    """

    name = "cwcl"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        temperature: float | Mapping[str, Any] = 0.07,
        anchors: Literal["query", "positive"] = "positive",
        reverse: bool = True,
        sharpness: Above0 = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.anchors, self.reverse, self.sharpness = anchors, reverse, sharpness

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        u, v = pairs.unit
        weights = similarity_weights(v if self.anchors == "positive" else u, self.sharpness)
        weights = weights.masked_fill(pairs.same, 1.0)
        loss = weighted_contrast(u @ v.T * self.temperature.scale(), weights)
        if self.reverse:
            loss = (loss + info_nce(v @ u.T * self.temperature.scale(), pairs.same).mean()) / 2
        shares = weights / weights.sum(1, keepdim=True)
        entropy = torch.special.entr(shares).sum(1).mean() / torch.log(torch.tensor(float(len(u))))
        return loss, {"weight_entropy": entropy}


def similarity_weights(anchors: Tensor, sharpness: float = 1.0) -> Tensor:
    """Unit vectors (N, E) -> (N, N) in [0, 1], without gradient."""
    fixed = anchors.detach()
    return ((1 + fixed @ fixed.T) / 2).clamp(0, 1).pow(sharpness)


def weighted_contrast(scores: Tensor, weights: Tensor) -> Tensor:
    """(N, N) scores and weights -> scalar; the identity as weights gives InfoNCE.

    >>> weighted_contrast(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2))
    tensor(0.3133)
    """
    return -((weights * scores.log_softmax(1)).sum(1) / weights.sum(1)).mean()
