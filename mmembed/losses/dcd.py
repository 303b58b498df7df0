"""DCD: a ranking loss, and a teacher that counts more for the queries that the student finds harder than it does.

L_i = CE(s_i) + a w_i mean_j (s_ij - t_ij)^2,  w_i = 1 - exp(-CE(s_i) / CE(t_i))  without gradient

CE(x_i) = mean over positives of -log softmax(x_i)_p, over the candidates with a teacher's score. Dynamic contrastive
distillation (Rao et al., arXiv 2207.01426), for a fusion model (ViLT, METER) that teaches two towers: the weight of a
query moves with the student. The weight is that of the authors' code, whose squared error is averaged over the batch
before it is weighted, so that a query's weight acts on all queries; here it acts on its own. Choosing hard negatives by
the teacher is data preparation: give the documents that it scored. The squared error compares scores with the teacher's
as they are, so the temperature is 1 unless a config says otherwise (from memory of the paper: the scale of its scores
was not read). Cosines stay within -1 and 1; for a teacher on another scale write `similarity: dot`, and `normalize:
false` of the model. Cost: a few passes over (Q, C).

When: a cross-encoder's scores of each query's candidates are there, and the teacher is sure where the student is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import logsumexp, mean
from mmembed.registry import Above0


class DCD(Loss):
    """Distillation of logits with a weight by query, beside a softmax over the same candidates.

    Args:
        distillation: a, the weight of the teacher.

    >>> valid, targets = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 1.0]])
    >>> scores = Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid, targets)
    >>> DCD()(scores)  # log 2 + (1 - 1/e)
    tensor([1.3253])
    """

    name = "dcd"
    reads: ClassVar[frozenset[str]] = frozenset({"score"})
    distils = "sides"
    defaults: ClassVar[Mapping[str, Any]] = {"temperature": 1.0}

    def __init__(self, distillation: Above0 = 1.0) -> None:
        super().__init__()
        self.distillation = distillation

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a scored positive. Raises ConfigError without teacher's scores."""
        targets, known = self.taught(scores)  # (Q, C) each
        positive = known & scores.positive
        of_student, of_teacher = (_surprise(values, known, positive) for values in (scores.values, targets))  # (Q,)
        ratio = of_student.detach() / of_teacher.clamp_min(torch.finfo(of_teacher.dtype).eps)
        error = mean((scores.values - targets).square(), known)  # (Q,)
        losses = of_student + self.distillation * (1 - torch.exp(-ratio)) * error
        return losses.masked_fill(~positive.any(1), 0.0)


def _surprise(values: Tensor, known: Tensor, positive: Tensor) -> Tensor:
    """mean over positives of -log softmax over the known candidates -> (Q,)."""
    return (logsumexp(values, known) - mean(values, positive)).masked_fill(~positive.any(1), 0.0)
