"""CLIP with hard negative captions: wrong word order, wrong attribute, wrong relation (NegCLIP, arXiv 2210.01936).

L = 1/2 ( InfoNCE(image -> captions and all negative captions) + InfoNCE(caption -> images) )

That is `contrastive`, symmetric, on records whose negatives are such captions. A negative that equals a positive of the
query (nothing in it could be swapped) is masked out. Records for it come from swaps of words (nouns, adjectives, verb
phrases); the paper's batches also hold the nearest pictures of each picture. Cost: that of `contrastive`.

When: captions have negatives that differ in word order, attribute or relation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives.aligned import alone, check_in_batch
from mmembed.objectives.contrastive import Contrastive, Gathered

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


class NegCLIP(Contrastive):
    """Symmetric InfoNCE whose forward direction also sees the hard negatives of all queries.

    Args:
        temperature: 0.07 (CLIP's start; learned there: `{value: 0.07, learn: true}`).
        similarity: as in `contrastive`.
    """

    name = "negclip"
    needs_negatives = True

    def __init__(self, temperature: float | Mapping[str, Any] = 0.07, similarity: str | None = None) -> None:
        super().__init__(temperature=temperature, similarity=similarity, symmetric=True)

    @property
    def title(self) -> str:
        return self.name

    def check(self, sources: Sequence[Source]) -> None:
        check_in_batch(self.name, sources)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Gathered:
        """Raises ConfigError where the source forbids in-batch negatives."""
        if not labels.in_batch:
            raise ConfigError(alone(self.name, labels.source))
        return super().gather(queries, documents, labels)
