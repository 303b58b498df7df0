"""Losses: functions of a score matrix; one equation, one small file, no model.

`Scores` carries an explicit relevance matrix instead of the convention that the diagonal is positive, so several
positives, graded relevance, in-batch negatives on or off, masked false negatives, STS and rerankers are one thing.
One file per loss; `LOSSES.build("infonce")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmembed.errors import ConfigError
from mmembed.registry import Registry

Distilled = Literal["list", "sides", "negatives"]


@dataclass(frozen=True)
class Scores:
    """What a loss sees. Q queries (rows), C candidates (columns).

    values: (Q, C) float, similarities already divided by the temperature.
    relevance: (Q, C) float >= 0, graded; above 0 is a positive, 0 a negative.
    valid: (Q, C) bool, the candidates that exist for the row; the others never count.
    targets: (Q, C) float, what a teacher gave, in its own units; NaN where it gave none. None for a loss that does not
        read `score`.
    temperature: what `values` were divided by, a number or a scalar.
    """

    values: Tensor
    relevance: Tensor
    valid: Tensor
    targets: Tensor | None = None
    temperature: float | Tensor = 1.0

    def __post_init__(self) -> None:
        given = [self.values, self.relevance, self.valid, *([] if self.targets is None else [self.targets])]
        if any(tensor.shape != self.values.shape for tensor in given):
            shapes = [tuple(tensor.shape) for tensor in given]
            raise ValueError(
                f"Scores: values, relevance, valid and targets must share one (Q, C) shape, found {shapes}"
            )

    @cached_property
    def positive(self) -> Tensor:
        """(Q, C) bool: valid and relevant."""
        return self.valid & (self.relevance > 0)

    @cached_property
    def negative(self) -> Tensor:
        """(Q, C) bool: valid and not relevant."""
        return self.valid & ~self.positive

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the positives, (P,) each."""
        rows, columns = self.positive.nonzero(as_tuple=True)
        return rows, columns


class Loss(nn.Module):
    """Base of the losses.

    reads: what it uses of the labels beyond positive or not: `relevance`, `score` (a teacher's, in `targets`).
    couples_rows: whether the loss of a row depends on other rows; an objective then gives the rows of all processes.
    objective: what the loss becomes where YAML names it as an objective: `contrastive`, or `pairs` (graded pairs).
    needs_grades: whether it has nothing to learn from a source that only tells relevant from not.
    distils: which teacher's scores of a query's documents it compares with each other: those of any two (`list`), of a
        positive and a negative (`sides`); or which it reads one by one: those of `negatives`. None: no score.
    guide_momentum: of a teacher (`Objective.teacher_momentum`) whose cosines are the `targets` that the data do not
        give. None: these stay NaN.
    least_candidates: with fewer documents a query its loss is 0.
    orders: whether two positives of different relevance teach it, as a positive and a negative do.
    one_by_one: whether it looks at each document by itself: a query without negatives teaches, too.
    tempered: whether a temperature changes it.
    defaults: options of the objective that a config with this loss has where it does not give them: its paper's.

    A row without what the loss compares (no positive, no teacher's score) gives 0.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    couples_rows: ClassVar[bool] = False
    objective: ClassVar[str] = "contrastive"
    needs_grades: ClassVar[bool] = False
    distils: Distilled | None = None
    guide_momentum: float | None = None
    least_candidates: int = 1
    orders: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    tempered: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:  # without options of its own a loss takes none: nn.Module would take any
        super().__init__()

    def __call__(self, scores: Scores) -> Tensor:
        """`forward` in float32 or above, outside autocast: a loss is a difference of numbers that are nearly equal."""
        wide = torch.promote_types(scores.values.dtype, torch.float32)
        tensors = {"values": scores.values, "relevance": scores.relevance, "targets": scores.targets}
        narrow = {key: one.to(wide) for key, one in tensors.items() if one is not None and one.dtype != wide}
        with torch.autocast(scores.values.device.type, enabled=False):
            losses: Tensor = super().__call__(replace(scores, **narrow) if narrow else scores)
        return losses

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        raise NotImplementedError

    def taught(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """-> the teacher's scores (Q, C), 0 where there is none, and where there are (Q, C) bool.

        Raises ConfigError without `targets`, and where one of them is infinite.
        """
        where = f"losses.{self.name}"
        if scores.targets is None:
            raise ConfigError(
                f"{where}: learns from a teacher's scores and is given none; score the documents with a teacher "
                "(`score` of each document), or use a loss without one"
            )
        known = scores.valid & ~scores.targets.isnan()  # (Q, C)
        targets = scores.targets.masked_fill(~known, 0.0)
        if targets.isinf().any():
            raise ConfigError(f"{where}: a teacher's 'score' is infinite; remove it or give a number")
        return targets, known


LOSSES: Registry[Loss] = Registry("mmembed.losses", Loss)
