"""A weighted sum of objectives on the same batch.

L = sum_k weight_k L_k. In YAML the objective is a list: `[{type: infonce}, {type: uniformity, weight: 0.1}]`. Each part
gathers for itself, so parts may differ in whether they look across processes. A part with a `layer` compares vectors of
that decoder layer, from the same pass of the backbone (`mmembed.objectives.layers` says which vectors these are):
CoDiEmb's MidNCE is `{type: thresholded_infonce, layer: middle}`. Cost: that of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmembed.content import Role
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings, Layer
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View, one_teacher, untaught

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


@dataclass(frozen=True)
class Part:
    """One term of the sum; `name` is what its loss is logged under, `layer` is compared (None: the last)."""

    name: str
    weight: float
    objective: Objective
    layer: Layer | None = None


class Combined(Objective):
    """Built from a list of blocks, see `mmembed.objectives.build_objective`.

    Metrics are those of each part, the first part winning where two share a name, and `loss_<name>`, without weight.
    Health monitors look at the first part that compares vectors of the last layer, whose scores rank documents in most
    recipes.

    Raises:
        ConfigError: some parts take graded pairs and others positives and negatives, none compares the last layer, or
            two want different teachers.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        compared = [number for number, part in enumerate(parts) if part.objective.compares]
        if not compared:
            raise ConfigError(untaught(parts[0].name))
        kinds = {parts[number].objective.pairs: parts[number].name for number in compared}
        if len(kinds) > 1:
            raise ConfigError(
                f"objective: '{kinds[True]}' takes graded pairs, '{kinds[False]}' takes positives and negatives, and a "
                "batch is one or the other; give each its batches with objective: {by_task: ...}"
            )
        of_last = [place for place in compared if parts[place].layer is None]
        if not of_last:
            raise ConfigError(
                "objective: every part has a lower layer, and nothing would train the last one's vectors, which the "
                "embedder gives; add a part without layer"
            )
        self.parts, self.leading = tuple(parts), of_last[0]
        self.objectives = nn.ModuleList([part.objective for part in parts])
        self.takes_negatives = any(part.objective.takes_negatives for part in parts)
        self.judges = self._leader.judges
        self.routes = any(part.objective.routes for part in parts)
        self._momentum = one_teacher({part.name: part.objective for part in parts})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(part.objective.reads for part in self.parts))

    @property
    def title(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def pairs(self) -> bool:
        return self._leader.pairs

    @property
    def predicts(self) -> frozenset[Role]:
        return frozenset().union(*(part.objective.predicts for part in self.parts))

    @property
    def _leader(self) -> Objective:
        return self.parts[self.leading].objective

    @property
    def layers(self) -> frozenset[Layer]:
        own = frozenset(part.layer for part in self.parts if part.layer is not None)
        return own.union(*(part.objective.layers for part in self.parts))

    @property
    def separable(self) -> bool:
        return all(part.objective.separable for part in self.parts)

    @property
    def teacher_momentum(self) -> float | None:
        return self._momentum

    @property
    def across_processes(self) -> bool:
        return any(part.objective.across_processes for part in self.parts)

    def check(self, sources: Sequence[Source]) -> None:
        for part in self.parts:
            part.objective.check(sources)

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self._leader.similarity_of(queries, documents)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> tuple[Any, ...]:
        gathered = []
        for part in self.parts:
            at = methodcaller("at", part.layer)
            gathered.append(part.objective.gather(at(queries), at(documents), labels.taught_as(at)))
        return tuple(gathered)

    def truncate(self, gathered: tuple[Any, ...], dims: slice) -> tuple[Any, ...]:
        return tuple(part.objective.truncate(one, dims) for part, one in zip(self.parts, gathered, strict=True))

    def compare(self, gathered: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        total: list[Tensor] = []
        for part, one in zip(self.parts, gathered, strict=True):
            loss, found = part.objective.compare(one)
            losses[f"loss_{part.name}"] = loss.detach()
            metrics = {**found, **metrics}
            total.append(part.weight * loss)
        return torch.stack(total).sum(), {**metrics, **losses}

    @torch.no_grad()
    def remember(self, gathered: tuple[Any, ...]) -> None:
        for part, one in zip(self.parts, gathered, strict=True):
            part.objective.remember(one)

    def commit(self) -> None:
        for part in self.parts:
            part.objective.commit()

    def forget(self) -> None:
        for part in self.parts:
            part.objective.forget()

    def view(self, gathered: tuple[Any, ...]) -> View:
        """Of the leading part. The loss of equal scores is not known of a sum: terms of geometry have none."""
        return replace(self._leader.view(gathered[self.leading]), chance=None)
