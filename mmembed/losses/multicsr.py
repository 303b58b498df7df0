"""MultiCSR: InfoNCE without those of a query's own negatives that a frozen guide finds too similar.

L = InfoNCE over the positives and the negatives with t_ij <= phi

Stage 3 of MultiCSR (arXiv 2310.10962): an unsupervised SimCSE guides, phi = .95 there; t are its cosines. There the
guide compares a query with the whole batch; here t is `score` of each document, which a record gives for the query's
own documents only. A negative without a guide's score counts, so every in-batch negative does. The released code
multiplies a masked logit by 0, which makes it exp(0) = 1 instead of removing it, writes the threshold as phi / .05
whatever the temperature, and averages a binary cross-entropy over all B x 2B cells, whose size shrinks with the batch;
here masked cells are out and the loss is InfoNCE. Cost: that of `infonce`.

When: the query's own negatives (mined ones) may be false, and a frozen guide's similarities to them are in the data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmembed.losses import Scores
from mmembed.losses.infonce import InfoNCE


class MultiCSR(InfoNCE):
    """InfoNCE that leaves out a query's own negatives where a guide model's `score` says that they are false.

    Args:
        phi: the query's own negatives with a guide's score, a cosine, above it do not count.
        negatives: as in `infonce`.

    >>> import torch
    >>> valid, targets = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1.0, 0.97, 0.2]])
    >>> MultiCSR()(Scores(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), valid, targets))  # one negative: log 2
    tensor([0.6931])
    """

    name = "multicsr"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance", "score"})
    distils = "negatives"

    def __init__(
        self, phi: Annotated[float, Field(ge=-1, le=1)] = 0.95, negatives: Literal["lower", "all"] = "lower"
    ) -> None:
        super().__init__(negatives)
        self.phi = phi

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses. Raises ConfigError without guide's scores."""
        targets, known = self.taught(scores)  # (Q, C) each
        false = scores.negative & known & (targets > self.phi)  # (Q, C)
        return super().forward(replace(scores, valid=scores.valid & ~false))
