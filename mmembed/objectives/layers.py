"""The same objective on the vectors of several decoder layers, so that the upper ones may be left out later.

L = sum_k weight_k [ L(vectors of layer k) + a t KL( softmax(v_last / t) || softmax(v_k / t) ) ]

Layer k is the state behind k decoder layers, through the final norm and the same pooling, projection and normalisation:
what a backbone of k layers gives. With `dims` beside it this is 2-D Matryoshka (arXiv 2402.14776). The alignment is
that of sentence-transformers' AdaptiveLayerLoss: over the coordinates of each query and document, without a gradient
into the last layer. There one lower layer is drawn a step; here every layer of the list counts in every step, for all
come from one pass of the backbone and only scores are made again: layer_weights of 1 / (layers below the last) are the
expectation of that draw. It pools lower layers as they are, without the final norm, which a decoder that ends there
does apply.

Embeddings are gathered across processes once, layers side by side. Cost of a layer: norm and pooling of the tokens, the
score matrix, and (rows, E) floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings, Layer
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.objectives.wrapping import Wrapping

Weight = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class SideBySide:
    """What the wrapped objective gathered of vectors (N, K * E), and the local ones, layer by layer."""

    gathered: Any
    size: int  # E
    local: tuple[Embeddings, ...]  # queries, documents


class Layers(Wrapping):
    """Wraps an objective. It is a key of the objective's block, not a type: `matryoshka: {layers: [2, -1]}`.

    Args:
        objective: what is summed over layers.
        layers: numbers from 1, negative from the last, or `middle`; the last is among them.
        layer_weights: above 0, one a layer, default 1 each.
        kl_weight: a, of the alignment with the last layer; 1 in sentence-transformers. 0: none.
        kl_temperature: t; 0.3 there.
        depth: how many layers the decoder has; None where a config is only checked.

    Raises:
        ConfigError: a layer outside of the decoder or twice, no last layer or no other, or an objective that remembers
            vectors, which would be those of several layers.
    """

    def __init__(
        self,
        objective: Objective,
        layers: Sequence[Layer],
        layer_weights: Sequence[Weight] | None = None,
        kl_weight: Annotated[float, Field(ge=0)] = 1.0,
        kl_temperature: Annotated[float, Field(gt=0)] | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__(objective)
        where = "objective.matryoshka.layers"
        self.of_layers = tuple(layer_number(layer, depth, where) for layer in layers)
        self.layer_weights = tuple(layer_weights) if layer_weights is not None else (1.0,) * len(self.of_layers)
        self.kl_weight, self.kl_temperature = kl_weight, 0.3 if kl_temperature is None else kl_temperature
        if len(set(self.of_layers)) != len(self.of_layers) or len(self.of_layers) < 2:
            raise ConfigError(f"{where}: found {list(layers)}; give two or more distinct layers")
        if depth is not None and None not in self.of_layers:
            raise ConfigError(f"{where}: found {list(layers)}; add the last, {depth}, whose vectors the model gives")
        if len(self.layer_weights) != len(self.of_layers):
            raise ConfigError(
                f"objective.matryoshka: {len(self.layer_weights)} layer_weights for {len(self.of_layers)} layers; give "
                "one weight a layer"
            )
        if kl_temperature is not None and not kl_weight:
            raise ConfigError("objective.matryoshka.kl_temperature: has no effect with kl_weight 0; remove one of them")
        for part in objective.modules():
            remembers = any(buffer.is_floating_point() for buffer in part.buffers())  # others count steps
            if remembers and isinstance(part, Objective) and "name" in vars(type(part)):
                raise ConfigError(
                    f"{where}: objective '{part.name}' remembers numbers of past vectors, which belong to one layer; "
                    f"give it a layer of its own in a list: {{type: {part.name}, layer: 2}}"
                )

    @property
    def layers(self) -> frozenset[Layer]:
        return frozenset(layer for layer in self.of_layers if layer is not None)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> SideBySide:
        sides = self._side_by_side(queries), self._side_by_side(documents)
        gathered = self.objective.gather(*sides, labels.taught_as(self._side_by_side))
        return SideBySide(gathered, queries.vectors.shape[-1], (queries, documents))

    def _side_by_side(self, embeddings: Embeddings) -> Embeddings:
        vectors = [embeddings.at(layer).vectors for layer in self.of_layers]
        return Embeddings(torch.cat(vectors, dim=-1), embeddings.mask)  # (N, K * E)

    def _of(self, gathered: SideBySide, place: int) -> Any:
        """What the wrapped objective would have gathered of one layer."""
        size = gathered.size
        return self.objective.truncate(gathered.gathered, slice(place * size, (place + 1) * size))

    def compare(self, gathered: SideBySide) -> tuple[Tensor, dict[str, Tensor]]:
        """Metrics are those of the last layer, and each lower layer's loss and distance to the last."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for place, (layer, weight) in enumerate(zip(self.of_layers, self.layer_weights, strict=True)):
            loss, found = self.objective.compare(self._of(gathered, place))
            losses.append(weight * loss)
            if layer is None:
                metrics = {**metrics, **found, "loss_layer_last": loss.detach()}
                continue
            metrics[f"loss_layer_{layer}"] = loss.detach()
            if self.kl_weight:
                distance = self._distance(gathered.local, layer)
                losses.append(weight * self.kl_weight * self.kl_temperature * distance)
                metrics[f"kl_layer_{layer}"] = distance.detach()
        return torch.stack(losses).sum(), metrics

    def _distance(self, local: Sequence[Embeddings], layer: Layer) -> Tensor:
        """KL divergence of the layer's coordinates from those of the last, mean over local queries and documents."""
        last, lower = (torch.cat([_rows(one.at(which)) for one in local]) for which in (None, layer))  # (N, E) each
        return divergence(last, lower, self.kl_temperature)

    def view(self, gathered: SideBySide) -> View:
        """Of the last layer. The loss of equal scores is summed over layers like the loss; none where alignment is."""
        view = self.objective.view(self._of(gathered, self.of_layers.index(None)))
        known = view.chance is not None and not self.kl_weight
        return replace(
            view, chance=view.chance * sum(self.layer_weights) if known and view.chance is not None else None
        )

    def remember(self, gathered: SideBySide) -> None:
        for place in range(len(self.of_layers)):
            self.objective.remember(self._of(gathered, place))


def divergence(last: Tensor, lower: Tensor, temperature: float) -> Tensor:
    """(N, E) twice -> scalar, mean over rows of KL(softmax(last / t) || softmax(lower / t)); no gradient into `last`.

    >>> divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    tensor(0.4621)
    """
    target = (last.detach() / temperature).softmax(-1)
    return functional.kl_div((lower / temperature).log_softmax(-1), target, reduction="batchmean")


def layer_number(layer: Layer, depth: int | None, where: str) -> Layer | None:
    """The number of a layer of YAML; None is the last. `middle` is (depth + 1) // 2, as in CoDiEmb's training code.

    Args:
        depth: how many layers the decoder has; None: what does not tell the number stays.
        where: opens the message.

    Raises:
        ConfigError: there is no such layer.

    >>> [layer_number(layer, 28, "layer") for layer in (7, -7, "middle", 28, -1)]
    [7, 22, 14, None, None]
    """
    if layer == -1 or (depth is not None and layer == depth):
        return None
    if layer == 0 or (depth is not None and layer != "middle" and abs(layer) > depth):
        have = "" if depth is None else f"the decoder has {depth} layers, "
        raise ConfigError(f"{where}: found {layer}; {have}give 1, 2, ..., from the last -1, -2, ..., or middle")
    if depth is None:
        return layer
    if layer == "middle":
        return layer_number((depth + 1) // 2, depth, where)
    return layer if layer > 0 else depth + 1 + layer


def _rows(embeddings: Embeddings) -> Tensor:
    """(N, E): one vector an input, or all vectors that count."""
    return embeddings.vectors if embeddings.mask is None else embeddings.vectors[embeddings.mask]
