"""Matryoshka: the same objective on nested prefixes of the embedding, so that a vector may be cut later.

L = sum_m weight_m * L(first m dimensions, normalised again) (Kusupati et al., arXiv 2205.13147, eq. 1). Embeddings are
gathered across processes once. Cost: the score matrix once a dimension. Nested over layers too: `layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError, nearest
from mmembed.objectives import Objective, View
from mmembed.objectives.layers import Layers
from mmembed.objectives.wrapping import Wrapping
from mmembed.registry import check_options

Weight = Annotated[float, Field(gt=0)]  # 0 would leave a dim out, below 0 its loss would grow
OF_DIMS, OF_LAYERS = ("dims", "weights"), ("layers", "layer_weights", "kl_weight", "kl_temperature")


class Matryoshka(Wrapping):
    """Wraps an objective. It is a key of the objective's block, not a type: `matryoshka: {dims: [256, 64]}`.

    Args:
        objective: what is summed over dims.
        dims: prefix lengths; usually the full size is among them.
        weights: above 0, one a dim, default 1 each (the sum, as in the paper; divide by hand for FlagEmbedding's mean).
    """

    def __init__(self, objective: Objective, dims: Sequence[int], weights: Sequence[Weight] | None = None) -> None:
        super().__init__(objective)
        self.dims = tuple(dims)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.dims)
        if not self.dims or min(self.dims) < 1 or len(set(self.dims)) != len(self.dims):
            raise ConfigError(f"objective.matryoshka.dims: found {list(dims)}; give distinct sizes of 1 or more")
        if len(self.weights) != len(self.dims):
            raise ConfigError(
                f"objective.matryoshka: {len(self.weights)} weights for {len(self.dims)} dims; give one weight a dim"
            )

    def view(self, gathered: Any) -> View:
        """Of the whole vectors; the loss of equal scores is summed over dims like the loss."""
        view = self.objective.view(gathered)
        return replace(view, chance=None if view.chance is None else view.chance * sum(self.weights))

    def compare(self, gathered: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Metrics are those of the largest dim, and each dim's loss."""
        total = torch.zeros(())
        metrics: dict[str, Tensor] = {}
        for weight, size in sorted(zip(self.weights, self.dims, strict=True), key=lambda pair: pair[1]):
            loss, of_size = self.objective.compare(self.truncate(gathered, slice(size)))
            total = total.to(loss.device) + weight * loss
            metrics = {**metrics, **of_size, f"loss_{size}": loss.detach()}
        return total, metrics

    def remember(self, gathered: Any) -> None:
        """Of each dim: what is known of a vector depends on how long it is. Vectors themselves are kept whole, once,
        whether or not their full size is among the dims."""
        if self.objective.keeps_vectors:
            self.objective.remember(gathered)
            return
        for size in self.dims:
            self.objective.remember(self.truncate(gathered, slice(size)))


def nested(objective: Objective, block: Any, embedding_size: int | None, depth: int | None) -> Objective:
    """The objective on prefixes, layers or both, from the YAML block `{dims, weights, layers, layer_weights, ...}`.

    Args:
        embedding_size: of the vectors. depth: how many layers the decoder has. None where a config is only checked.

    Raises:
        ConfigError: unknown keys, keys without effect, dims above the embedding, layers outside of the decoder.
    """
    if not isinstance(block, Mapping) or not any(
        isinstance(block.get(key), list | tuple) for key in ("dims", "layers")
    ):
        raise ConfigError(
            "objective.matryoshka: write {dims: [256, 128, 64]}, {layers: [2, -1]} or both, with weights and "
            "layer_weights if they are not all 1"
        )
    for key in block:
        if key not in (*OF_DIMS, *OF_LAYERS):
            raise ConfigError(
                f"objective.matryoshka: unknown option '{key}'; {nearest(str(key), (*OF_DIMS, *OF_LAYERS))}"
            )
    for wanted, *others in (OF_DIMS, OF_LAYERS):
        for key in others:
            if key in block and wanted not in block:
                raise ConfigError(f"objective.matryoshka.{key}: has no effect without {wanted}; remove it")
    of_dims, of_layers = ({key: block[key] for key in keys if key in block} for keys in (OF_DIMS, OF_LAYERS))
    where = "objective.matryoshka"
    if of_dims:
        objective = Matryoshka(objective, **check_options(Matryoshka, of_dims, where, given=("objective",)))
        if embedding_size is not None and max(objective.dims) > embedding_size:
            raise ConfigError(f"{where}.dims: {max(objective.dims)} is above the embedding size {embedding_size}")
    if of_layers:
        options = check_options(Layers, of_layers, where, given=("objective", "depth"))
        objective = Layers(objective, **options, depth=depth)
    return objective
