"""InfoNCE against a queue of the positives of past steps: many negatives for a small batch.

L = -mean_i log( e^{s_ii} / ( e^{s_ii} + sum_{j != i} e^{s_ij} + sum_{k in queue} e^{s_ik} ) ),  s_ij = q_i.k_j / tau

With `in_batch: true` as in ESimCSE (arXiv 2109.04380), with false the middle sum is left out as in Contriever (arXiv
2112.09118) and MoCo. This step's positives enter the queue when the step is made. Rows of the queue that are a known
positive of the query, or the query itself, do not count. Without negatives of the batch the first step has none at all,
and a loss of 0 (there the queue begins with random vectors).

`momentum` makes the queue's vectors those of a momentum encoder, a slow copy of the model without dropout: .995 in
ESimCSE, whose pairs of the batch are the model's own; .9995 in Contriever, where with `in_batch: false` the positive
k_i is the momentum encoder's too, and no gradient reaches a document. Without it the queue's vectors are those of
earlier weights of this model, which go stale within some tens of steps at common learning rates, hence a short default
of `size`. ESimCSE is `{type: negative_queue, momentum: 0.995}` with a `size` of about 2.5 batches (from memory),
Contriever `{type: negative_queue, momentum: 0.9995, size: 131072, in_batch: false}`. Cost: (N, N + size) floats, size
x E in memory, and the momentum encoder's (`mmembed.training.teacher`).

When: memory or data allow small batches only, and the queue is the way to more negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Momentum, Pairs
from mmembed.objectives.memory import Queue
from mmembed.objectives.softmax import info_nce
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Below1, Positive


class NegativeQueue(Aligned):
    """InfoNCE whose negatives are also the positives of past steps, from a first-in-first-out queue.

    Args:
        embedding_size: of the vectors; the model gives it.
        temperature: 0.05, in both papers.
        size: vectors that the queue holds.
        in_batch: other positives of the batch are negatives, too.
        label_smoothing: share of the target that all candidates have in common (0 in both papers).
        momentum: of a momentum encoder, whose vectors the queue holds; null: the model's own.
    """

    name = "negative_queue"
    keeps_vectors = True
    contrasts = True

    def __init__(
        self,
        embedding_size: int = 1,
        temperature: float | Mapping[str, Any] = 0.05,
        size: Positive = 1024,
        in_batch: bool = True,
        label_smoothing: Below1 = 0.0,
        momentum: Momentum | None = None,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.temperature, self.in_batch, self.label_smoothing = Temperature(temperature), in_batch, label_smoothing
        self.queue = Queue(size, embedding_size)

    @property
    def teacher_momentum(self) -> float | None:
        return self.momentum

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        if not self.in_batch and pairs.taught is not None:
            positives = pairs.taught.unit_views[1]
        queued, keys = self.queue.read(queries.shape[1])  # (M, E), (M, 2)
        same = pairs.same if self.in_batch else torch.ones_like(pairs.same)
        loss = against_queue(
            queries,
            positives,
            queued.to(queries.dtype),
            same,
            pairs.knows(keys),
            self.temperature.scale(),
            self.label_smoothing,
        )
        return loss, {"queued": torch.tensor(float(len(keys)), device=loss.device)}

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        positives = pairs.unit[1].detach() if pairs.taught is None else pairs.taught.unit_views[1]
        return positives, pairs.view_keys[:, 0]

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        self.queue.put(*news)


def against_queue(
    vectors: Tensor,
    positives: Tensor,
    queued: Tensor,
    same: Tensor,
    known: Tensor,
    scale: Tensor | float,
    smoothing: float = 0.0,
) -> Tensor:
    """Unit vectors (N, E), (N, E), (M, E); no negatives of a row: (N, N) and (N, M) bool -> scalar.

    >>> same, known = torch.eye(2).bool(), torch.zeros(2, 0).bool()
    >>> against_queue(torch.eye(2), torch.eye(2), torch.zeros(0, 2), same, known, 1.0)
    tensor(0.3133)
    """
    scores = torch.cat([vectors @ positives.T, vectors @ queued.T], dim=1) * scale  # (N, N + M)
    return info_nce(scores, torch.cat([same, known], dim=1), smoothing).mean()
