"""What an embedding model gives: it stands below models and objectives, which must not know each other."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.errors import MmembedError

Layer = int | Literal["middle"]  # of the decoder, from 1; negative from the last, which is -1


class Embeddings(NamedTuple):
    """Vectors of B inputs, float32.

    vectors: (B, E), or (B, T, E) for late interaction.
    mask: None, or (B, T) bool, true on the vectors that count.
    layers: None, or by number the vectors of the lower layers that the model was asked for, each as `vectors`.
    """

    vectors: Tensor
    mask: Tensor | None = None
    layers: dict[int, Tensor] | None = None

    @classmethod
    def concatenate(cls, parts: "Sequence[Embeddings]") -> "Embeddings":
        """One after the other; sequences of vectors are padded to the longest."""
        masks = [part.mask for part in parts if part.mask is not None]
        longest = max((mask.shape[1] for mask in masks), default=0)

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            if masks:
                tensors = [functional.pad(one, (0, 0, 0, longest - one.shape[1])) for one in tensors]
            return torch.cat(list(tensors))

        mask = torch.cat([functional.pad(one, (0, longest - one.shape[1])) for one in masks]) if masks else None
        tensors = [joined(alike) for alike in zip(*(part.tensors for part in parts), strict=True)]
        return parts[0]._replace(mask=mask).with_tensors(tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """The vectors, then those of each lower layer."""
        return [self.vectors, *(self.layers or {}).values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Embeddings":
        """The same inputs with other vectors, in the order of `tensors`."""
        layers = None if self.layers is None else dict(zip(self.layers, tensors[1:], strict=True))
        return Embeddings(tensors[0], self.mask, layers)

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
        mask = None if self.mask is None else self.mask[index]
        return self._replace(mask=mask).with_tensors([one[index] for one in self.tensors])

    def truncate(self, dims: slice) -> "Embeddings":
        """These dimensions of the vectors, not normalised again."""
        return Embeddings(self.vectors[..., dims], self.mask)
