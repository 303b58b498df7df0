"""Grades as a distribution over the candidates of a row: the targets of list-wise losses."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import masked
from mmembed.registry import Above0


class GradedLoss(Loss):
    """Base of the list-wise losses whose target is the distribution of the grades.

    Args:
        label_temperature: divides grades, not scores; see `kl_divergence`.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    needs_grades = True

    def __init__(self, label_temperature: Above0 = 1.0) -> None:
        super().__init__()
        self.label_temperature = label_temperature


def graded(scores: Scores, label_temperature: float) -> tuple[Tensor, Tensor]:
    """-> softmax of relevance / label_temperature over the valid candidates (Q, C), and the rows that count (Q,) bool.

    A row counts that has a positive. Candidates of other queries have relevance 0, as the query's own irrelevant ones.
    """
    targets = masked(scores.relevance / label_temperature, scores.valid).softmax(1)  # (Q, C)
    return targets * scores.valid, scores.positive.any(1)


def cross_entropy(scores: Scores, targets: Tensor) -> Tensor:
    """-sum_j y_ij log softmax(s_i)_j over the valid candidates -> (Q,); targets (Q, C) of each row sum to 1."""
    values = masked(scores.values, scores.valid)  # (Q, C)
    return values.logsumexp(1) - (targets * values).sum(1)


def entropy(targets: Tensor) -> Tensor:
    """-sum_j y_ij log y_ij, (Q, C) -> (Q,)."""
    return -targets.xlogy(targets).sum(1)
