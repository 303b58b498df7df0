"""InfoNCE with any number of positives and graded relevance.

L_i = sum_p w_ip * -log( exp(s_ip) / (exp(s_ip) + sum_{j in negatives(i, p)} exp(s_ij)) ),  w_ip = r_ip / sum_p' r_ip'

With one positive a query this is the loss of van den Oord et al. (arXiv 1807.03748, eq. 4) as every embedder uses it.
Cost: one logsumexp over (G, C), a row for each query and distinct grade of its positives (G = Q for ungraded data).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.losses import Loss, Scores


class InfoNCE(Loss):
    """InfoNCE over the valid candidates of each row.

    Args:
        negatives: what a positive is compared with. `lower` (default): the candidates of lower relevance, so positives
            of one grade do not push each other away and a better one ranks above a worse one. `all`: every other valid
            candidate, other positives too (SupCon's L_out, arXiv 2004.11362).

    A row without a positive gives 0.
    """

    name = "infonce"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})

    def __init__(self, negatives: Literal["lower", "all"] = "lower") -> None:
        super().__init__()
        if negatives not in ("lower", "all"):
            raise ConfigError(f"losses.infonce: negatives is '{negatives}'; use 'lower' or 'all'")
        self.negatives = negatives

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        floor = torch.finfo(scores.values.dtype).min / 2  # not -inf: a row without negatives must give 0, not NaN
        values = scores.values.masked_fill(~scores.valid, floor)  # (Q, C)
        weights = scores.relevance * scores.positive  # (Q, C)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        if self.negatives == "all":
            return -(weights * functional.log_softmax(values, dim=1)).sum(1)  # (Q,)
        rows, columns = scores.positive.nonzero(as_tuple=True)  # (P,) each
        grades, level = torch.unique(scores.relevance[rows, columns], return_inverse=True)  # (L,), (P,)
        pair, of_positive = torch.unique(rows * len(grades) + level, return_inverse=True)  # (G,), (P,)
        row = pair // len(grades)  # (G,)
        lower = scores.relevance[row] < grades[pair % len(grades)].unsqueeze(1)  # (G, C)
        negatives = values[row].masked_fill(~lower, floor).logsumexp(1)  # (G,)
        # -log(e^s / (e^s + e^n)) = softplus(n - s): exact also where the loss is far below the rounding of s
        losses = functional.softplus(negatives[of_positive] - values[rows, columns]) * weights[rows, columns]  # (P,)
        return losses.new_zeros(len(values)).index_add(0, rows, losses)  # (Q,)
