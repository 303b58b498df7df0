"""Contrast between two modalities, and within each against a queue (the global terms of TCL, arXiv 2202.10401).

L = mean of InfoNCE(x -> y), InfoNCE(y -> x), InfoNCE(x -> x' and queue of x'), InfoNCE(y -> y' and queue of y')

x' and y', the augmented query and positive, are the second and third positive of a record; they enter their queue when
the step is made. With `momentum` (.995 there) primed vectors are those of a momentum encoder, and the cross-modal terms
are the paper's: InfoNCE(x -> y' and queue of y') with the target

(1 - alpha) onehot_i + alpha softmax( x'_i.(y' and queue of y') / tau ),

and the same with sides exchanged (there alpha grows from 0 to .4 over the first epoch; here it stands). Without, primed
vectors are the model's own without a gradient, cross-modal targets are hard and within the batch, and queues go stale
sooner (see `negative_queue`). The paper's two terms of a vector with its own tokens are `global_local`, which wants
pooling `multi_vector`; with it x and y are the means of an input's vectors, as there, and the mean of all six terms is
`[{type: global_local, weight: 0.333}, {type: tcl, weight: 0.667}]`. Cost: (N, N) floats twice, (N,
N + size) twice (six times with momentum), and the momentum encoder's (`mmembed.training.teacher`).

When: both sides have augmentations and each modality should stay ordered within itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Momentum, Pairs
from mmembed.objectives.memory import Queue
from mmembed.objectives.negative_queue import against_queue
from mmembed.objectives.softmax import both_ways, log_shares
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Positive

ALPHA = 0.4


@dataclass(frozen=True)
class Primed:
    """The augmented side of N pairs, without gradients: unit vectors (N, E), those in its queue (M, E), and which of
    these are no negatives of a row (N, M) bool."""

    vectors: Tensor
    queued: Tensor
    known: Tensor


class TCL(Aligned):
    """InfoNCE both ways, and of both sides with their augmentations and queues of past ones.

    Args:
        embedding_size: of the vectors; the model gives it.
        temperature: 0.07 (learned in [0.001, 0.5] there).
        size: vectors that each queue holds; 65,536 there, of a momentum encoder.
        momentum: of a momentum encoder, 0.995 in the paper; null: the model's own vectors.
        alpha: share of the momentum encoder in the cross-modal targets, 0.4 where there is one.

    Raises:
        ConfigError: a share of an encoder that is not there.
    """

    name = "tcl"
    many_vectors = None
    keeps_vectors = True
    least_pairs = 2
    contrasts = True
    positives_needed = 3
    by_place = True

    def __init__(
        self,
        embedding_size: int = 1,
        temperature: float | Mapping[str, Any] = 0.07,
        size: Positive = 1024,
        momentum: Momentum | None = None,
        alpha: Annotated[float, Field(ge=0, le=1)] | None = None,
    ) -> None:
        super().__init__()
        if alpha is not None and momentum is None:
            raise ConfigError(
                f"objectives.tcl.alpha: {alpha:g} is the share of a momentum encoder in the targets; set momentum "
                "(0.995 in the paper), or remove alpha"
            )
        self.temperature, self.momentum = Temperature(temperature), momentum
        self.alpha = ALPHA if alpha is None else alpha
        self.of_queries, self.of_positives = Queue(size, embedding_size), Queue(size, embedding_size)

    @property
    def teacher_momentum(self) -> float | None:
        return self.momentum

    @property
    def _queues(self) -> tuple[Queue, Queue]:
        return self.of_queries, self.of_positives

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = pairs.unit
        (of_x, of_y), scale = self._primed(pairs), self.temperature.scale()
        own = [
            against_queue(side, primed.vectors, primed.queued, pairs.same, primed.known, scale)
            for side, primed in ((x, of_x), (y, of_y))
        ]
        if pairs.taught is None:
            cross = both_ways(x @ y.T * scale, pairs.same).mean()
        else:
            forward = softened(x, of_x.vectors, of_y, pairs.same, scale, self.alpha)
            cross = (forward + softened(y, of_y.vectors, of_x, pairs.same, scale, self.alpha)) / 2
        metrics = {"cross_modal": cross.detach(), "in_modal": torch.stack(own).mean().detach()}
        return (2 * cross + torch.stack(own).sum()) / 4, metrics

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self._augmented(pairs), pairs.view_keys[:, 1:]

    def _primed(self, pairs: Pairs) -> tuple[Primed, Primed]:
        found = []
        for vectors, queue in zip(self._augmented(pairs), self._queues, strict=True):
            queued, keys = queue.read(vectors.shape[1])
            found.append(Primed(vectors, queued.to(vectors.dtype), pairs.knows(keys)))
        return found[0], found[1]

    @staticmethod
    def _augmented(pairs: Pairs) -> Tensor:
        """x' and y', unit vectors without gradients (2, N, E)."""
        views = pairs.unit_views.detach() if pairs.taught is None else pairs.taught.unit_views
        return views[2:]

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        vectors, keys = news
        for queue, side, of_side in zip(self._queues, vectors, keys.unbind(1), strict=True):
            queue.put(side, of_side)


def softened(
    vectors: Tensor, teacher: Tensor, others: Primed, same: Tensor, scale: Tensor | float, alpha: float
) -> Tensor:
    """Unit vectors of one side and the teacher's of it, (N, E) each, against the other side -> scalar.

    Args:
        same: (N, N) bool, no negatives of a row. alpha: the teacher's share of the target.

    >>> x, others = torch.eye(2), Primed(torch.eye(2), torch.zeros(0, 2), torch.zeros(2, 0).bool())
    >>> softened(x, x, others, torch.eye(2).bool(), 1.0, alpha=0.0)
    tensor(0.3133)
    """
    itself = torch.eye(len(same), len(same) + len(others.queued), dtype=torch.bool, device=same.device)  # (N, N + M)
    valid = ~torch.cat([same, others.known], dim=1) | itself
    candidates = torch.cat([others.vectors, others.queued])  # (N + M, E)
    shares = log_shares(vectors @ candidates.T * scale, valid)
    theirs = log_shares((teacher @ candidates.T * scale).detach(), valid).exp()
    target = (1 - alpha) * itself + alpha * theirs
    return -(target * shares).sum(1).mean()
