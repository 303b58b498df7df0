"""ListNet: cross-entropy between the distribution of the grades and that of the scores.

L_i = -sum_j y_ij log x_ij,  x = softmax(s_i), y = softmax(r_i / tau_label) over the valid candidates

Cao et al., "Learning to rank: from pairwise approach to listwise approach" (ICML 2007), with the probabilities of the
first place. It is `kl_divergence` plus the entropy of the grades, which has no gradient. Cost: as `kl_divergence`.

When: documents have grades and the order within a query matters; the classic to compare others with.
"""

from __future__ import annotations

from torch import Tensor

from mmembed.losses import Scores
from mmembed.losses.distributions import GradedLoss, cross_entropy, graded


class ListNet(GradedLoss):
    """List-wise cross-entropy against graded relevance.

    Args:
        label_temperature: divides grades, not scores; see `kl_divergence`.

    >>> import torch
    >>> values, valid = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    >>> ListNet()(Scores(values, torch.tensor([[1.0, 0.0]]), valid))  # log 2, whatever the grades
    tensor([0.6931])
    """

    name = "listnet"

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive."""
        targets, counted = graded(scores, self.label_temperature)  # (Q, C), (Q,)
        return cross_entropy(scores, targets).masked_fill(~counted, 0.0)
