"""How strongly a document pulls, and which way: any weight of GMR with any direction.

L = 1/D sum_j sign_j sg(W_j) (D . h_j),   sign = -1 for a relevant document, +1 for another

W_sft = sigmoid(z_n - z_y) of a relevant document, sigmoid(z_y - z_n) of another
W_cl  = the gradient of InfoNCE with respect to z_y: 1 - p of the relevant one, p of another,
        p = softmax of z_y over the query's documents
D . h = z_y - z_n (sft), or z_y (cl)

W has no gradient (sg), so that of L is what the paper writes: `sft` with `sft` is the gradient of the loss `sft`, `cl`
with `cl` that of `infonce` on z_yes (up to D in place of Q). Weight `one` is W = 1. GMR (arXiv 2510.14824) splits
supervised fine-tuning and contrastive training so: the weight explains most of their difference. Cost: (Q, K).

When: an experiment on why one loss beats another; the value of L says nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.objectives import Objective
from mmembed.objectives.ranking import Judged, judged, read


class WeightDirection(Objective):
    """A weight and a direction.

    Args:
        weight: sft, contrastive, or one.
        direction: sft, or contrastive.
    """

    name = "weight_direction"
    judges = True

    def __init__(
        self,
        weight: Literal["sft", "contrastive", "one"] = "sft",
        direction: Literal["sft", "contrastive"] = "sft",
    ) -> None:
        super().__init__()
        self.weight, self.direction = weight, direction
        self.needs_negatives = weight == "contrastive"  # a share among the query's documents
        self.needs_both = not self.needs_negatives

    @property
    def separable(self) -> bool:
        return True

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Judged:
        return judged(documents.vectors, labels)

    def compare(self, gathered: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        positive = gathered.labels.relevance > 0  # (D,)
        weights = self._weights(gathered, positive)
        values = read(gathered.logits, "difference" if self.direction == "sft" else "yes")
        loss = (torch.where(positive, -weights, weights) * values).mean()
        means = {"weight_positive": weights[positive].mean(), "weight_negative": weights[~positive].mean()}
        return loss, {name: value.detach() for name, value in means.items()}

    @torch.no_grad()
    def _weights(self, gathered: Judged, positive: Tensor) -> Tensor:
        """(D,)."""
        if self.weight == "one":
            return torch.ones_like(gathered.logits[:, 0])
        if self.weight == "sft":
            difference = read(gathered.logits, "difference")
            return torch.sigmoid(torch.where(positive, -difference, difference))
        values = gathered.table(read(gathered.logits, "yes"), -torch.inf)  # (Q, K)
        shares = values.softmax(1)[gathered.owner, gathered.place]  # (D,)
        return torch.where(positive, 1 - shares, shares)
