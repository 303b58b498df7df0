"""InfoNCE with any number of positives and graded relevance.

L_i = sum_p w_ip * -log( exp(s_ip) / (exp(s_ip) + sum_{j in negatives(i, p)} exp(s_ij)) ),  w_ip = r_ip / sum_p' r_ip'

With one positive a query this is the loss of van den Oord et al. (arXiv 1807.03748, eq. 4) as every embedder uses it.
Cost: one logsumexp over (G, C), a row for each query and distinct grade of its positives (Q for ungraded data).

When: nothing speaks for another one. The default; the only one that needs no more than pairs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.losses import Loss, Scores
from mmembed.losses.rows import against, logsumexp, mean_of_positives


class InfoNCE(Loss):
    """InfoNCE over the valid candidates of each row.

    Args:
        negatives: what a positive is compared with. `lower` (default): the candidates of lower relevance, so positives
            of one grade do not push each other away and a better one ranks above a worse one. `all`: every other valid
            candidate, other positives too (SupCon's L_out, arXiv 2004.11362).

    A row without a positive gives 0.

    >>> all_valid = torch.ones(1, 2, dtype=torch.bool)
    >>> InfoNCE()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), all_valid))  # log 2
    tensor([0.6931])
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
        rows, columns = scores.cells  # (P,) each
        relevance = scores.relevance[rows, columns]  # (P,)
        if self.negatives == "all":
            losses = logsumexp(scores.values, scores.valid)[rows] - scores.values[rows, columns]  # (P,)
        else:
            lower, positives = _lower(scores, rows, columns, relevance)  # (P,) each
            # -log(e^s / (e^s + e^n)) = softplus(n - s): exact also where the loss is far below the rounding of s
            losses = functional.softplus(lower - positives)
        return mean_of_positives(losses, rows, len(scores.values), relevance)


def _lower(scores: Scores, rows: Tensor, columns: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Of each positive: the logsumexp of the candidates whose relevance is lower, and its own score, (P,) each."""
    best = relevance.new_zeros(len(scores.values)).scatter_reduce(0, rows, relevance, "amax")  # (Q,)
    if bool((relevance == best[rows]).all()):  # one grade a row: the matrix itself, without copies of its rows
        lower, positives = against(scores.values, scores.negative, rows, columns)  # (Q,), (P,)
        return lower[rows], positives
    grades, level = torch.unique(relevance, return_inverse=True)  # (L,), (P,)
    pair, of_positive = torch.unique(rows * len(grades) + level, return_inverse=True)  # (G,), (P,)
    row = pair // len(grades)  # (G,)
    lower = scores.valid[row] & (scores.relevance[row] < grades[pair % len(grades)].unsqueeze(1))  # (G, C)
    return logsumexp(scores.values[row], lower)[of_positive], scores.values[rows, columns]
