"""InfoNCE for graded pairs: only pairs at or above a threshold are anchors, the documents of all pairs are candidates.

L = mean over i with y_i >= threshold of -log( e^{s_ii / tau} / sum_j e^{s_ij / tau} )

The MidNCE of CoDiEmb (arXiv 2508.11442, training code: tau 0.02, threshold 1), which takes the vectors of the middle
hidden layer: `layer: middle` beside it, in a list. The authors pool that layer's states as they are, here they go
through the final norm first, as those of the last layer do. As there, documents of other processes are no candidates.

When: graded pairs should also contrast: the best of them are anchors against all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.objectives.contrastive import Contrastive, Gathered
from mmembed.objectives.pairs import check_pairs

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


class ThresholdedInfoNCE(Objective):
    """InfoNCE whose anchors are the graded pairs at or above a threshold.

    Args:
        threshold: gold from which a pair is an anchor.
        temperature: a number, or `{value, learn}`.
        similarity: as of `contrastive`.
        mask_duplicates: documents that equal an anchor's own, or its query, do not count against it.
    """

    name = "thresholded_infonce"

    def __init__(
        self,
        threshold: Annotated[float, Field(gt=0, le=1)] = 1.0,
        temperature: float | Mapping[str, Any] = 0.02,
        similarity: str | None = None,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.contrastive = Contrastive(
            temperature=temperature,
            similarity=similarity,
            cross_device_negatives=False,
            mask_duplicates=mask_duplicates,
        )

    @property
    def pairs(self) -> bool:
        return True

    def check(self, sources: Sequence[Source]) -> None:
        check_pairs(self.name, sources)
        for source in sources:
            if source.grades.high < self.threshold:
                raise ConfigError(
                    f"data source '{source.name}': its highest similarity is {source.grades.high:g}, below the "
                    f"threshold {self.threshold:g} of objective '{self.name}': the loss is always 0. Lower the "
                    "threshold, or remove the objective"
                )

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self.contrastive.similarity_of(queries, documents)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Gathered:
        """A batch without an anchor has a loss of 0, with a gradient of 0."""
        relevance = (labels.relevance >= self.threshold).to(labels.relevance.dtype)  # (D,)
        labels = replace(labels, relevance=relevance, in_batch=True)
        gathered = self.contrastive.gather(queries, documents, labels)
        anchors = int(gathered.relevance.any(1).sum())
        # rows without a positive have loss 0 in the mean over all queries
        return replace(gathered, weight=len(labels.query_keys) / anchors if anchors else 0.0)

    def truncate(self, gathered: Gathered, dims: slice) -> Gathered:
        return self.contrastive.truncate(gathered, dims)

    def compare(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = self.contrastive.compare(gathered)  # its metrics are means over rows that are no anchors too
        return loss, {"anchors": gathered.relevance.any(1).sum().float()}

    def view(self, gathered: Gathered) -> View:
        return replace(self.contrastive.view(gathered), chance=None)
