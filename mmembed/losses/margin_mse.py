"""MarginMSE: the student's margin between a positive and a negative is the teacher's.

L_i = mean_{p, n} ( (s_ip - s_in) - (t_ip - t_in) )^2 over a query's positives and negatives with a teacher's score

Hofstätter et al. (arXiv 2010.02666), on raw dot products: `similarity: dot, temperature: 1.0` unless a config says
otherwise. With them the model needs `normalize: false` (margins of unit vectors stay within -2 and 2), and its default
`normalize: true` is refused; for a teacher whose scores are cosines write `similarity: cosine`. Margins do not depend
on where the teacher's scores are centred, but on their scale. Cost: a few passes over (Q, C): with a = s - t the mean
over pairs is var(a_p) + var(a_n) + (mean a_p - mean a_n)^2, without pairs.

When: a teacher scored a positive and negatives of each query, on a scale worth copying.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import mean


class MarginMSE(Loss):
    """Distillation of margins from the `score` of each document; `score` of a positive and of a negative.

    >>> import torch
    >>> valid, targets = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[9.0, 6.0]])
    >>> MarginMSE()(Scores(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]), valid, targets))  # (1 - 3)^2
    tensor([4.])
    """

    name = "margin_mse"
    reads: ClassVar[frozenset[str]] = frozenset({"score"})
    distils = "sides"
    defaults: ClassVar[Mapping[str, Any]] = {"similarity": "dot", "temperature": 1.0}

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without both sides. Raises ConfigError without teacher's scores."""
        targets, known = self.taught(scores)  # (Q, C) each
        errors, losses, centres = scores.values - targets, [], []
        for side in (known & scores.positive, known & scores.negative):
            centre = mean(errors, side)  # (Q,)
            losses.append(mean((errors - centre[:, None]).square(), side))
            centres.append(centre)
        both = (known & scores.positive).any(1) & (known & scores.negative).any(1)  # (Q,)
        return (losses[0] + losses[1] + (centres[0] - centres[1]).square()).masked_fill(~both, 0.0)
