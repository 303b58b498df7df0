"""DCL: the positive is not in the denominator.

L_i = 1/|P_i| sum_p ( -s_ip + log sum_{j in N_i} exp(s_ij) )

Decoupled contrastive learning (Yeh et al., arXiv 2110.06848): without the positive in the sum, a small batch
does not shrink the gradient of pairs that are already right. The loss can be negative. The paper's 2 (B - 1) negatives
of a batch of B are the other positives and the other queries, and its code's temperature is 0.1: `same_tower_negatives:
true, temperature: 0.1` unless a config says otherwise. Sources with in-batch negatives off have their own negatives
alone. The released code masks by adding log(1e-45), which is too little at temperatures of 0.01 and below; here masked
cells are out. Other positives of the row are in no denominator. Cost: one logsumexp over (Q, C + Q).

When: batches are small (8 to 256), where InfoNCE's own positive shrinks the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import against, mean_of_positives


class DCL(Loss):
    """Decoupled contrastive loss, for small batches.

    >>> import torch
    >>> values, valid = torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DCL()(Scores(values, torch.tensor([[1.0, 0.0]]), valid))  # -3 + 1
    tensor([-2.])
    """

    name = "dcl"
    defaults: ClassVar[Mapping[str, Any]] = {"temperature": 0.1, "same_tower_negatives": True}

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a positive or without a negative."""
        rows, columns = scores.cells  # (P,) each
        contested = scores.negative.any(1)[rows]
        rows, columns = rows[contested], columns[contested]
        negatives, positives = against(scores.values, scores.negative, rows, columns)  # (Q,), (P,)
        losses = negatives[rows] - positives  # (P,)
        return mean_of_positives(losses, rows, len(scores.values))
