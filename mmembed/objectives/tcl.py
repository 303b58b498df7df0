"""Contrast between two modalities, and within each against a queue (the global terms of TCL, arXiv 2202.10401).

L = mean of InfoNCE(x -> y), InfoNCE(y -> x), InfoNCE(x -> x' and queue of x'), InfoNCE(y -> y' and queue of y')

x' and y', the augmented query and positive, are the second and third positive of a record; they enter their queue when
the step is made. There, primed vectors come from a momentum encoder and the cross-modal targets are softened by it
(.4); the trainer holds one model, so ours are its own vectors without a gradient and hard targets, and queues go stale
sooner (see `negative_queue`). The two terms of a vector with its own tokens are `global_local`. Cost: (N, N) floats
twice, (N, N + size) twice.

When: both sides have augmentations and each modality should stay ordered within itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.memory import Queue
from mmembed.objectives.negative_queue import against_queue
from mmembed.objectives.softmax import both_ways
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Positive


class TCL(Aligned):
    """InfoNCE both ways, and of both sides with their augmentations and queues of past ones.

    Args:
        embedding_size: of the vectors; the model gives it.
        temperature: 0.07 (learned in [0.001, 0.5] there).
        size: vectors that each queue holds; 65,536 there, of a momentum encoder.
    """

    name = "tcl"
    least_pairs = 2
    contrasts = True
    positives_needed = 3

    def __init__(
        self, embedding_size: int = 1, temperature: float | Mapping[str, Any] = 0.07, size: Positive = 1024
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.of_queries, self.of_positives = Queue(size, embedding_size), Queue(size, embedding_size)

    @property
    def _queues(self) -> tuple[Queue, Queue]:
        return self.of_queries, self.of_positives

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, y, *augmented = pairs.unit_views
        scale = self.temperature.scale()
        cross = both_ways(x @ y.T * scale, pairs.same).mean()
        own = []
        for side, other, queue in zip((x, y), augmented, self._queues, strict=True):
            queued, keys = queue.read(side.shape[1])
            own.append(against_queue(side, other.detach(), queued.to(side.dtype), pairs.same, pairs.knows(keys), scale))
        metrics = {"cross_modal": cross.detach(), "in_modal": torch.stack(own).mean().detach()}
        return (2 * cross + torch.stack(own).sum()) / 4, metrics

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor] | None:
        if pairs.queries.shape[1] < self.of_queries.vectors.shape[1]:  # a prefix: whole vectors are kept
            return None
        return pairs.unit_views[2:].detach(), pairs.view_keys[:, 1:]

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        vectors, keys = news
        for queue, side, of_side in zip(self._queues, vectors, keys.unbind(1), strict=True):
            queue.put(side, of_side)
