"""Distillation of a list: the student's distribution over a query's candidates is the teacher's.

L_i = -sum_j y_ij log x_ij,  x = softmax(s_i), y = softmax(t_i / tau_teacher) over the candidates with a teacher's score

A cross-encoder teaches a bi-encoder, as in FlagEmbedding's `kl_div`; the cross-entropy with a teacher's softened
distribution is that of Hinton et al. (arXiv 1503.02531, one temperature for both there). The KL divergence is less by
the teacher's entropy, which has no gradient. In-batch candidates have no teacher's score and do not take part: add
`infonce` for them. Cost: two softmaxes over (Q, C).

When: a reranker's scores of each query's candidates are there; add `infonce` for the other candidates of the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.distributions import cross_entropy, entropy
from mmembed.losses.rows import masked
from mmembed.registry import Above0


class DistilKL(Loss):
    """List-wise distillation from the `score` of each document.

    Args:
        teacher_temperature: divides the teacher's scores; the objective's temperature divides the student's.
        subtract_entropy: the KL divergence: 0 where both agree, the same gradient.

    >>> import torch
    >>> valid, targets = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 0.0]])
    >>> DistilKL()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid, targets))  # log 2, whatever the teacher
    tensor([0.6931])
    """

    name = "distil_kl"
    reads: ClassVar[frozenset[str]] = frozenset({"score"})
    distils = "list"

    def __init__(self, teacher_temperature: Above0 = 1.0, subtract_entropy: bool = False) -> None:
        super().__init__()
        self.teacher_temperature, self.subtract_entropy = teacher_temperature, subtract_entropy

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row with less than two teacher's scores. Raises ConfigError without any."""
        targets, known = self.taught(scores)  # (Q, C) each
        teacher = masked(targets / self.teacher_temperature, known).softmax(1) * known  # (Q, C)
        losses = cross_entropy(replace(scores, valid=known), teacher)  # (Q,)
        if self.subtract_entropy:
            losses = losses - entropy(teacher)
        return losses.masked_fill(known.sum(1) < 2, 0.0)
