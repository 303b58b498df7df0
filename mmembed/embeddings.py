"""What an embedding model gives: it stands below models and objectives, which must not know each other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Embeddings(NamedTuple):
    """Vectors of B inputs, float32.

    vectors: (B, E), or (B, T, E) for late interaction.
    mask: None, or (B, T) bool, true on the vectors that count.
    """

    vectors: Tensor
    mask: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: "Sequence[Embeddings]") -> "Embeddings":
        """One after the other; sequences of vectors are padded to the longest."""
        masks = [part.mask for part in parts if part.mask is not None]
        if not masks:
            return cls(torch.cat([part.vectors for part in parts]))
        longest = max(mask.shape[1] for mask in masks)
        vectors = [functional.pad(part.vectors, (0, 0, 0, longest - part.vectors.shape[1])) for part in parts]
        return cls(
            torch.cat(vectors), torch.cat([functional.pad(mask, (0, longest - mask.shape[1])) for mask in masks])
        )

    def rows(self, index: Tensor) -> "Embeddings":
        """The inputs at `index` (N,) long."""
        return Embeddings(self.vectors[index], None if self.mask is None else self.mask[index])

    def truncate(self, size: int) -> "Embeddings":
        """The first `size` dimensions, not normalised again."""
        return Embeddings(self.vectors[..., :size], self.mask)
