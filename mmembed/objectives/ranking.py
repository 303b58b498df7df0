"""Scores of a query's own documents, judged pair by pair, under any loss: the objective of rerankers.

L = mean_i loss( s_i, r_i ),  s_ij = z_ij / tau,  z = z_yes - z_no, or z_yes alone

A reranker reads a query with a document and gives logits, (D, L) for the D documents of a batch; those of a query are
its row of Scores (Q, K), and no other query's documents are in it. So supervised fine-tuning (`sft`), contrastive
training (`infonce`), list-wise losses and distillation differ in the loss alone (GMR, arXiv 2510.14824): the same head,
template, groups and data. Nothing is gathered from other processes: a loss that compares rows (`wasserstein`) sees
those of its own. Cost: (Q, K).

When: a reranker (`recipes/train_reranker.py`); `loss` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.heads import log_odds
from mmembed.losses import LOSSES, Distilled, Loss, Scores
from mmembed.objectives import Objective
from mmembed.objectives.temperature import Temperature

Read = Literal["difference", "yes"]


@dataclass(frozen=True)
class Judged:
    """Logits (D, L) of the D documents of Q queries, and where each stands: its query (D,) and place there (D,)."""

    logits: Tensor
    owner: Tensor
    place: Tensor
    shape: tuple[int, int]
    labels: BatchLabels

    def table(self, values: Tensor, empty: float = 0.0) -> Tensor:
        """(D,) -> (Q, K), `empty` where a query has fewer documents."""
        return values.new_full(self.shape, empty).index_put((self.owner, self.place), values)

    @property
    def valid(self) -> Tensor:
        """(Q, K)."""
        return self.table(torch.ones_like(self.owner, dtype=torch.bool), False)


class Ranking(Objective):
    """Any loss over each query's own documents.

    Args:
        loss: name or block of a loss.
        score: `difference` of the two logits, or the logit of `yes` alone (GMR's contrastive score).
        temperature: a number, or `{value, learn}`.
    """

    name = "ranking"
    judges = True

    def __init__(
        self,
        loss: str | Mapping[str, Any] = "sft",
        score: Read = "difference",
        temperature: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__()
        self.loss: Loss = LOSSES.build(loss)
        if self.loss.guide_momentum is not None:
            raise ConfigError(
                f"objective.loss: '{self.loss.name}' has a guide of vectors, and pairs have none; take another"
            )
        self.score, self.temperature = score, Temperature(temperature)
        taught = self.loss.distils is not None  # by a teacher's scores, which are asked for by themselves
        self.needs_both = not taught and self.loss.one_by_one
        self.needs_order = not taught and (self.loss.orders or self.loss.needs_grades)
        self.needs_negatives = not (taught or self.needs_both or self.needs_order)

    @property
    def reads(self) -> frozenset[str]:
        return self.loss.reads

    @property
    def title(self) -> str:
        return self.loss.name

    @property
    def separable(self) -> bool:
        return not self.loss.couples_rows

    @property
    def distils(self) -> Distilled | None:
        return self.loss.distils

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Judged:
        return judged(documents.vectors, labels)

    def compare(self, gathered: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.scores(gathered)
        losses = self.loss(scores)  # (Q,)
        return losses.mean(), _metrics(gathered, scores)

    def scores(self, gathered: Judged) -> Scores:
        """(Q, K)."""
        labels, temperature = gathered.labels, self.temperature.scale()
        values = gathered.table(read(gathered.logits, self.score)) * temperature
        targets = None
        if "score" in self.loss.reads and labels.scores is not None:
            targets = gathered.table(labels.scores.to(values.dtype), float("nan"))
        relevance = gathered.table(labels.relevance.to(values.dtype))
        return Scores(values, relevance, gathered.valid, targets, 1 / torch.as_tensor(temperature))


def judged(logits: Tensor, labels: BatchLabels) -> Judged:
    """Where each document stands among those of its query, which come one behind another."""
    counts = torch.bincount(labels.owner, minlength=len(labels.query_keys))  # (Q,)
    place = torch.arange(len(labels.owner), device=labels.owner.device) - (counts.cumsum(0) - counts)[labels.owner]
    return Judged(logits, labels.owner, place, (len(counts), int(counts.max())), labels)


def read(logits: Tensor, score: Read) -> Tensor:
    """(..., L) -> (...). The one logit of a linear head is its score, whatever is asked for."""
    return logits[..., 0] if score == "yes" else log_odds(logits)


@torch.no_grad()
def _metrics(gathered: Judged, scores: Scores) -> dict[str, Tensor]:
    """The share of queries whose best document is relevant, and what SFT's loss is of the relevant ones alone."""
    values = read(gathered.logits, "difference")
    best = scores.values.masked_fill(~scores.valid, -torch.inf).argmax(1, keepdim=True)  # (Q, 1)
    relevant = gathered.labels.relevance > 0
    positive = torch.nn.functional.softplus(-values[relevant].float()).mean()
    return {"precision_at_1": scores.positive.gather(1, best).float().mean(), "positive_nll": positive}
