"""RankNet: of each two documents of different grades, the better one scores higher.

L_i = 1/|P| sum_{(a, b) in P} log( 1 + e^{s_b - s_a} ),  P = { (a, b): r_a > r_b }

Burges et al., "Learning to rank using gradient descent" (ICML 2005). A mean over the pairs, so that long lists weigh no
more. Cost: (Q, C, C) cells.

When: graded documents, where the order matters and not the size of scores; `lambdarank` where the top matters most.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores


class RankNet(Loss):
    """Pairs of documents of different grades.

    >>> import torch
    >>> valid = torch.ones(1, 2, dtype=torch.bool)
    >>> RankNet()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid))  # log 2
    tensor([0.6931])
    """

    name = "ranknet"
    objective = "ranking"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    orders = True
    least_candidates = 2

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row of one grade."""
        losses, pairs = pair_losses(scores)  # (Q, C, C) each
        return losses.masked_fill(~pairs, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def pair_losses(scores: Scores) -> tuple[Tensor, Tensor]:
    """log(1 + e^{s_b - s_a}) of all documents a, b of each query (Q, C, C), and which a is better than b."""
    values, grades = scores.values, scores.relevance
    both = scores.valid[:, :, None] & scores.valid[:, None]
    return functional.softplus(values[:, None] - values[:, :, None]), both & (grades[:, :, None] > grades[:, None])
