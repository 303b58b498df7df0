"""DCLW: decoupled contrastive learning whose positives weigh more where they are far.

L_i = 1/|P_i| sum_p ( -w_ip s_ip + log sum_{j in N_i} exp(s_ij) ),  w_ip = 2 - n softmax_ip(tau s_ip / sigma)

The softmax runs over all n positives of the batch, so weights are 1 on average and near 2 for a positive of low
similarity (Yeh et al., arXiv 2110.06848; sigma .5 in the released code). tau s is the similarity without temperature.
The gradient flows through the weight, as in the released code. Rows are coupled by the softmax. Negatives and
temperature are those of `dcl` unless a config says otherwise: `same_tower_negatives: true, temperature: 0.1`. Cost: as
`dcl`.

When: as `dcl`, and far positives should count more than near ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.dcl import DCL
from mmembed.losses.rows import against, mean_of_positives
from mmembed.registry import Above0


class DCLW(Loss):
    """DCL with a weight on each positive, larger where its similarity is low.

    Args:
        sigma: width of the weights; small ones put more on the farthest positives.
        detach_weights: no gradient through the weights; they are then weights and nothing else.

    >>> import torch
    >>> values, valid = torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DCLW()(Scores(values, torch.tensor([[1.0, 0.0]]), valid))  # a positive alone has weight 1
    tensor([-2.])
    """

    name = "dclw"
    couples_rows = True
    defaults: ClassVar[Mapping[str, Any]] = DCL.defaults

    def __init__(self, sigma: Above0 = 0.5, detach_weights: bool = False) -> None:
        super().__init__()
        self.sigma, self.detach_weights = sigma, detach_weights

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive or without a negative."""
        rows, columns = scores.cells  # (P,) each
        contested = scores.negative.any(1)[rows]
        rows, columns = rows[contested], columns[contested]
        negatives, positives = against(scores.values, scores.negative, rows, columns)  # (Q,), (P,)
        weights = 2 - len(positives) * (positives * scores.temperature / self.sigma).softmax(0)  # (P,)
        weights = weights.detach() if self.detach_weights else weights
        losses = negatives[rows] - weights * positives  # (P,)
        return mean_of_positives(losses, rows, len(scores.values))
