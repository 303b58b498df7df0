"""KL divergence of the scores from graded relevance.

L_i = sum_j y_ij log( y_ij / x_ij ),  x = softmax(s_i), y = softmax(r_i / tau_label) over the valid candidates

The list-wise baseline of SyCL (arXiv 2503.23239), "batchmean" there: mean over queries. It has the gradient of
`listnet` and is 0 where scores order as grades do. Cost: two softmaxes over (Q, C).

When: documents have grades and the order within a query matters; `listnet` has the same gradient.
"""

from __future__ import annotations

from torch import Tensor

from mmembed.losses import Scores
from mmembed.losses.distributions import GradedLoss, cross_entropy, entropy, graded


class KLDivergence(GradedLoss):
    """List-wise: the scores of a query become a distribution that should be that of its grades.

    Args:
        label_temperature: divides grades, not scores (1 in SyCL, whose grades are 0 to 3). Among thousands of
            candidates of grade 0 such a target is nearly uniform; below 1 more of it is on the best.

    >>> import torch
    >>> values, valid = torch.tensor([[3.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> loss = KLDivergence()(Scores(values, torch.tensor([[1.0, 0.0]]), valid))  # the same distribution
    >>> round(loss.item(), 6)
    0.0
    """

    name = "kl_divergence"

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive."""
        targets, counted = graded(scores, self.label_temperature)  # (Q, C), (Q,)
        return (cross_entropy(scores, targets) - entropy(targets)).masked_fill(~counted, 0.0)
