"""Losses: functions of a score matrix; one equation, one small file, no model.

`Scores` carries an explicit relevance matrix instead of the convention that the diagonal is positive, so several
positives, graded relevance, in-batch negatives on or off, masked false negatives, STS and rerankers are one thing.
One file per loss; `LOSSES.build("infonce")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmembed.registry import Registry


@dataclass(frozen=True)
class Scores:
    """What a loss sees. Q queries (rows), C candidates (columns).

    values: (Q, C) float, similarities already divided by the temperature.
    relevance: (Q, C) float >= 0, graded; above 0 is a positive, 0 a negative.
    valid: (Q, C) bool, the candidates that exist for the row; the others never count.
    targets: (Q, C) float, what a teacher gave, in its own units; NaN where it gave none. None for a loss that does not
        read `score`.
    """

    values: Tensor
    relevance: Tensor
    valid: Tensor
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        given = [self.values, self.relevance, self.valid, *([] if self.targets is None else [self.targets])]
        if any(tensor.shape != self.values.shape for tensor in given):
            shapes = [tuple(tensor.shape) for tensor in given]
            raise ValueError(
                f"Scores: values, relevance, valid and targets must share one (Q, C) shape, found {shapes}"
            )

    @property
    def positive(self) -> Tensor:
        """(Q, C) bool: valid and relevant."""
        return self.valid & (self.relevance > 0)


class Loss(nn.Module):
    """Base of the losses. `reads` names what it uses of the labels beyond positive or not: `relevance`, `score`."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        raise NotImplementedError


LOSSES: Registry[Loss] = Registry("mmembed.losses", Loss)
