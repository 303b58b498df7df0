"""Each document by itself: the cross-entropy of "yes" or "no" (supervised fine-tuning of a reranker).

L_i = -1/K sum_j log sigmoid( y_ij s_ij ),  s = z_yes - z_no,  y = +1 for a relevant document, -1 for another

over the K valid candidates of a query: softmax over the two answers is one sigmoid of their difference (GMR, arXiv
2510.14824). With `balanced` relevant and other documents have the same weight, however many there are of each.
Cost: one pass over (Q, C).

When: rerankers whose scores shall be probabilities; GMR finds it ahead of contrastive training.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores


class TwoTokens(Loss):
    """Cross-entropy of two answers, document by document.

    Args:
        balanced: the mean of relevant documents and that of the others count alike.

    >>> import torch
    >>> valid = torch.ones(1, 2, dtype=torch.bool)
    >>> TwoTokens()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid))  # log 2
    tensor([0.6931])
    """

    name = "sft"
    objective = "ranking"
    one_by_one = True

    def __init__(self, balanced: bool = False) -> None:
        super().__init__()
        self.balanced = balanced

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        losses = functional.softplus(scores.values.where(scores.negative, -scores.values))  # (Q, C)
        if not self.balanced:
            return _mean(losses, scores.valid)
        sides = [_mean(losses, side) for side in (scores.positive, scores.negative)]
        there = sum(side.any(1).to(losses.dtype) for side in (scores.positive, scores.negative))
        return (sides[0] + sides[1]) / there.clamp_min(1)  # type: ignore[union-attr]


def _mean(losses: Tensor, where: Tensor) -> Tensor:
    """(Q,) of the cells that count; 0 of a row without any."""
    return losses.masked_fill(~where, 0.0).sum(1) / where.sum(1).clamp_min(1)
