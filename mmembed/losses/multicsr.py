"""MultiCSR: InfoNCE without the negatives that a frozen guide finds too similar to the query.

L = InfoNCE over the positives and the negatives with t_ij <= phi

Stage 3 of MultiCSR (arXiv 2310.10962): t are the cosines of an unsupervised SimCSE, which compares each query with all
documents of the batch, phi = .95 there; a query's own positives stay. Here the guide is the model that training starts
from (`momentum: 1`, see `mmembed.training.teacher`), so an unsupervised SimCSE guides where training goes on from one:
`pairs: dropout` makes it. A `score` of a document in the data stands in the place of the guide's cosine for the
document's own query; with `momentum: null` there are no others, and in-batch negatives are not judged.

The released code multiplies a masked logit by 0, which makes it exp(0) = 1 instead of removing it, writes the threshold
as phi / .05 whatever the temperature, and averages a binary cross-entropy over all B x 2B cells, whose size shrinks
with the batch; here masked cells are out and the loss is InfoNCE. Cost: that of `infonce`, one product more, and the
guide's pass over each batch.

When: negatives may be false, of other queries or mined ones, and the model at its start can tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmembed.losses import Scores
from mmembed.losses.infonce import InfoNCE


class MultiCSR(InfoNCE):
    """InfoNCE that leaves out negatives whose similarity to the query is above phi for a frozen guide.

    Args:
        phi: a cosine.
        negatives: as in `infonce`.
        momentum: of the guide. 1, the frozen start, in the paper; null: the data's `score` of documents alone.

    >>> import torch
    >>> valid, targets = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1.0, 0.97, 0.2]])
    >>> MultiCSR()(Scores(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), valid, targets))  # one negative: log 2
    tensor([0.6931])
    """

    name = "multicsr"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance", "score"})

    def __init__(
        self,
        phi: Annotated[float, Field(ge=-1, le=1)] = 0.95,
        negatives: Literal["lower", "all"] = "lower",
        momentum: Annotated[float, Field(gt=0, le=1)] | None = 1.0,
    ) -> None:
        super().__init__(negatives)
        self.phi, self.guide_momentum = phi, momentum
        self.distils = "negatives" if momentum is None else None

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses. Raises ConfigError without guide's scores."""
        targets, known = self.taught(scores)  # (Q, C) each
        false = scores.negative & known & (targets > self.phi)  # (Q, C)
        return super().forward(replace(scores, valid=scores.valid & ~false))
