"""Matryoshka: the same objective on nested prefixes of the embedding, so that a vector may be cut later.

L = sum_m weight_m * L(first m dimensions, normalised again) (Kusupati et al., arXiv 2205.13147, eq. 1). Embeddings are
gathered across processes once. Cost: the score matrix once a dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.registry import check_options

if TYPE_CHECKING:
    from mmembed.data.streaming import Source

Weight = Annotated[float, Field(gt=0)]  # 0 would leave a dim out, below 0 its loss would grow


class Matryoshka(Objective):
    """Wraps an objective. It is a key of the objective's block, not a type: `matryoshka: {dims: [256, 64]}`.

    Args:
        objective: what is summed over dims.
        dims: prefix lengths; usually the full size is among them.
        weights: above 0, one a dim, default 1 each (the sum, as in the paper; divide by hand for FlagEmbedding's mean).
    """

    def __init__(self, objective: Objective, dims: Sequence[int], weights: Sequence[Weight] | None = None) -> None:
        super().__init__()
        self.objective, self.dims = objective, tuple(dims)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.dims)
        if not self.dims or min(self.dims) < 1 or len(set(self.dims)) != len(self.dims):
            raise ConfigError(f"objective.matryoshka.dims: found {list(dims)}; give distinct sizes of 1 or more")
        if len(self.weights) != len(self.dims):
            raise ConfigError(
                f"objective.matryoshka: {len(self.weights)} weights for {len(self.dims)} dims; give one weight a dim"
            )

    @classmethod
    def build(cls, objective: Objective, block: Any, embedding_size: int | None) -> Matryoshka:
        """From the YAML block `{dims, weights}`. Raises ConfigError on unknown keys and dims above the embedding."""
        if not isinstance(block, Mapping) or not isinstance(block.get("dims"), list | tuple):
            raise ConfigError("objective.matryoshka: write {dims: [256, 128, 64]}, with weights if they are not all 1")
        wrapped = cls(objective, **check_options(cls, block, "objective.matryoshka", given=("objective",)))
        if embedding_size is not None and max(wrapped.dims) > embedding_size:
            raise ConfigError(
                f"objective.matryoshka.dims: {max(wrapped.dims)} is above the embedding size {embedding_size}"
            )
        return wrapped

    @property
    def reads(self) -> frozenset[str]:
        return self.objective.reads

    @property
    def pairs(self) -> bool:
        return self.objective.pairs

    @property
    def across_processes(self) -> bool:
        return self.objective.across_processes

    def check(self, sources: Sequence[Source]) -> None:
        self.objective.check(sources)

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self.objective.similarity_of(queries, documents)

    def gather(self, *args: Any) -> Any:
        return self.objective.gather(*args)

    def truncate(self, gathered: Any, size: int) -> Any:
        return self.objective.truncate(gathered, size)

    def view(self, gathered: Any) -> View:
        """Of the whole vectors; the loss of equal scores is summed over dims like the loss."""
        view = self.objective.view(gathered)
        return replace(view, chance=None if view.chance is None else view.chance * sum(self.weights))

    def compare(self, gathered: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Metrics are those of the largest dim, and each dim's loss."""
        total = torch.zeros(())
        metrics: dict[str, Tensor] = {}
        for weight, size in sorted(zip(self.weights, self.dims, strict=True), key=lambda pair: pair[1]):
            loss, of_size = self.objective.compare(self.truncate(gathered, size))
            total = total.to(loss.device) + weight * loss
            metrics = {**metrics, **of_size, f"loss_{size}": loss.detach()}
        return total, metrics

    def remember(self, gathered: Any) -> None:
        """Of each dim: what is known of a vector depends on how long it is."""
        for size in self.dims:
            self.objective.remember(self.truncate(gathered, size))

    def commit(self) -> None:
        self.objective.commit()

    def forget(self) -> None:
        self.objective.forget()
