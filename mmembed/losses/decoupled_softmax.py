"""Decoupled softmax: each positive against the negatives, never against another positive.

L_i = 1/|P_i| sum_p -log( exp(s_ip) / (exp(s_ip) + sum_{j in N_i} exp(s_ij)) )

DEXML (arXiv 2310.10636), made for queries with many labels: with an ordinary softmax a positive that
already ranks high pushes the others down. Its softmax baseline is `{type: infonce, negatives: all}` times the number of
positives of a row, which the released code does not divide by. The released code masks with -100, here masked cells are
out. For ungraded data this is `infonce`; the difference is that it does not look at grades. Cost: one logsumexp over
(Q, C).

When: queries have many positives (labels, tags) that must not push each other down.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import against, mean_of_positives


class DecoupledSoftmax(Loss):
    """DEXML's loss for many positives a query: they do not compete with each other.

    >>> import torch
    >>> values, valid = torch.tensor([[5.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> DecoupledSoftmax()(Scores(values, torch.tensor([[1.0, 1.0, 0.0]]), valid))  # (.0181 + log 2) / 2
    tensor([0.3556])
    """

    name = "decoupled_softmax"

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive."""
        rows, columns = scores.cells  # (P,) each
        negatives, positives = against(scores.values, scores.negative, rows, columns)  # (Q,), (P,)
        losses = functional.softplus(negatives[rows] - positives)  # (P,)
        return mean_of_positives(losses, rows, len(scores.values))
