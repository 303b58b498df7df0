"""What an embedding model gives: it stands below models and objectives, which must not know each other."""

from typing import NamedTuple

from torch import Tensor


class Embeddings(NamedTuple):
    """Vectors of B inputs, float32.

    vectors: (B, E), or (B, T, E) for late interaction.
    mask: None, or (B, T) bool, true on the vectors that count.
    """

    vectors: Tensor
    mask: Tensor | None = None

    def rows(self, index: Tensor) -> "Embeddings":
        """The inputs at `index` (N,) long."""
        return Embeddings(self.vectors[index], None if self.mask is None else self.mask[index])

    def truncate(self, size: int) -> "Embeddings":
        """The first `size` dimensions, not normalised again."""
        return Embeddings(self.vectors[..., :size], self.mask)
