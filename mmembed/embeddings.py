"""What an embedding model gives: it stands below models and objectives, which must not know each other."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.errors import MmembedError

Layer = int | Literal["middle"]  # of the decoder, from 1; negative from the last, which is -1


class Embeddings(NamedTuple):
    """Vectors of B inputs, float32; and what their tokens cost to predict, where that was asked for.

    vectors: (B, E), or (B, T, E) for late interaction.
    mask: None, or (B, T) bool, true on the vectors that count.
    layers: None, or by number the vectors of the lower layers that the model was asked for, each as `vectors`.
    nll: None, or (B,) float32: minus the log-likelihood of the predicted tokens of each input, their sum.
    predicted: None, or (B,) long: how many these are.
    routing: None, or (B, 2 * experts) float32: sums over the tokens and layers of each input of the probabilities that
        its routers gave the experts, and of how often these were chosen.
    """

    vectors: Tensor
    mask: Tensor | None = None
    layers: dict[int, Tensor] | None = None
    nll: Tensor | None = None
    predicted: Tensor | None = None
    routing: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: "Sequence[Embeddings]") -> "Embeddings":
        """One after the other; sequences of vectors are padded to the longest."""
        masks = [part.mask for part in parts if part.mask is not None]
        longest = max((mask.shape[1] for mask in masks), default=0)

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            if masks and tensors[0].ndim > 2:
                tensors = [functional.pad(one, (0, 0, 0, longest - one.shape[1])) for one in tensors]
            return torch.cat(list(tensors))

        mask = torch.cat([functional.pad(one, (0, longest - one.shape[1])) for one in masks]) if masks else None
        tensors = [joined(alike) for alike in zip(*(part.tensors for part in parts), strict=True)]
        counts = [part.predicted for part in parts if part.predicted is not None]
        predicted = torch.cat(counts) if counts else None
        return parts[0]._replace(mask=mask, predicted=predicted).with_tensors(tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """What takes gradients: the vectors, those of each lower layer, what the tokens cost, and their routing."""
        told = [one for one in (self.nll, self.routing) if one is not None]
        return [self.vectors, *(self.layers or {}).values(), *told]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Embeddings":
        """The same inputs with other numbers, in the order of `tensors`."""
        behind = 1 + len(self.layers or {})
        layers = None if self.layers is None else dict(zip(self.layers, tensors[1:behind], strict=True))
        nll = None if self.nll is None else tensors[behind]
        routing = None if self.routing is None else tensors[-1]
        return self._replace(vectors=tensors[0], layers=layers, nll=nll, routing=routing)

    def at(self, layer: Layer | None) -> "Embeddings":
        """The vectors of one layer; None is the last. Raises MmembedError for a layer that the model did not give."""
        if layer is None:
            return self
        if self.layers is None or layer not in self.layers:
            raise MmembedError(
                f"layer {layer}: the model gave the vectors of {sorted(self.layers or {}) or 'its last layer alone'}; "
                "build the objective with the backbone's depth, and ask the model for the objective's layers"
            )
        return Embeddings(self.layers[int(layer)], self.mask)

    def rows(self, index: Tensor) -> "Embeddings":
        """The inputs at `index` (N,) long."""
        mask, predicted = (None if one is None else one[index] for one in (self.mask, self.predicted))
        return self._replace(mask=mask, predicted=predicted).with_tensors([one[index] for one in self.tensors])

    def truncate(self, dims: slice) -> "Embeddings":
        """These dimensions of the vectors, not normalised again."""
        return Embeddings(self.vectors[..., dims], self.mask)
