"""ListMLE: the likelihood of the order of grades, drawn document after document without replacement.

L_i = -1/K sum_k log( e^{s_k} / sum_{j >= k} e^{s_j} ),  documents numbered by falling grade

Xia et al., "Listwise approach to learning to rank" (ICML 2008), divided by the K documents, so that long lists weigh
no more. Documents of one grade have no order: they come in the order of their scores, which costs least and asks for
nothing between them. Places behind the last relevant document say nothing and do not count. Cost: a sort of (Q, C).

When: graded documents in a list whose whole order matters.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmembed.losses import Loss, Scores


class ListMle(Loss):
    """The likelihood of the order of grades.

    >>> valid = torch.ones(1, 2, dtype=torch.bool)
    >>> ListMle()(Scores(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), valid))  # log 2
    tensor([0.6931])
    """

    name = "listmle"
    objective = "ranking"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    orders = True
    least_candidates = 2

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive."""
        values = scores.values.masked_fill(~scores.valid, -torch.inf)
        order = values.detach().argsort(dim=1, descending=True, stable=True)
        grades = scores.relevance.masked_fill(~scores.valid, -1.0).gather(1, order)
        order = order.gather(1, grades.argsort(dim=1, descending=True, stable=True))  # (Q, C)
        values, placed = values.gather(1, order), scores.positive.gather(1, order)
        below = values.flip(1).logcumsumexp(1).flip(1)  # (Q, C) of this document and those behind it
        losses = (below - values).masked_fill(~placed, 0.0).sum(1)
        return losses / placed.sum(1).clamp_min(1)
