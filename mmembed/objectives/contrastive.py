"""Contrastive objective: each local query against the candidates of all processes.

Scores are similarity / temperature; labels become an explicit relevance matrix; `symmetric` averages in the other
direction (each positive document against all queries), as CLIP does. Where queries have different numbers of positives,
a process's reverse loss weighs as many as it has, so that the mean over processes is the mean over all positives.
Cost: (Q, C) floats, a few times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import Objective, View
from mmembed.objectives.gather import gather_counts, gather_embeddings
from mmembed.objectives.relations import Relations
from mmembed.objectives.similarity import get_similarity
from mmembed.objectives.temperature import Temperature


@dataclass(frozen=True)
class Gathered:
    """Rows and columns of the two score matrices; the reverse one only where the objective is symmetric."""

    queries: Embeddings  # Q local
    candidates: Embeddings  # C of all processes
    relevance: Tensor  # (Q, C)
    valid: Tensor  # (Q, C)
    relations: Relations  # of the labels
    targets: Tensor | None = None  # (Q, C), for a loss that reads scores
    reverse: Gathered | None = None  # rows are local positive documents, columns are the queries of all processes
    weight: float = 1.0  # of the mean over rows: this process's share of the rows of all, times their number


class Contrastive(Objective):
    """Any loss over (queries, candidates) scores.

    Args:
        loss: name or block of a loss.
        temperature: a number (default 0.05, sentence-transformers' scale 20), or `{value, learn}`.
        similarity: cosine, dot, maxsim, maxsim_mean; default cosine for one vector an input, maxsim for several.
        symmetric: average the loss with its reverse direction. Sources with in-batch negatives off have one direction
            only: there a document meets no query but its own.
        cross_device_negatives: candidates of all processes, or of this one.
        mask_duplicates: other queries' documents that equal an own positive, or answer the same query, do not count.
        false_negative_margin: negatives whose similarity is above the best positive's + margin do not count (0.1 in
            Qwen3-Embedding, arXiv 2506.05176, section 2).
    """

    name = "contrastive"

    def __init__(
        self,
        loss: str | Mapping[str, Any] = "infonce",
        temperature: float | Mapping[str, Any] = 0.05,
        similarity: str | None = None,
        symmetric: bool = False,
        cross_device_negatives: bool = True,
        mask_duplicates: bool = True,
        false_negative_margin: float | None = None,
    ) -> None:
        super().__init__()
        self.loss = LOSSES.build(loss)
        self.temperature = Temperature(temperature)
        self.similarity = similarity if similarity is None else get_similarity(similarity)
        self.symmetric, self.cross_device_negatives = symmetric, cross_device_negatives
        self.mask_duplicates, self.false_negative_margin = mask_duplicates, false_negative_margin
        if false_negative_margin is not None and false_negative_margin < 0:
            raise ConfigError(
                f"objective.false_negative_margin: {false_negative_margin} would mask true negatives; use 0 or more"
            )

    @property
    def reads(self) -> frozenset[str]:
        return self.loss.reads

    @property
    def across_processes(self) -> bool:
        return self.cross_device_negatives

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        similarity = self.similarity or get_similarity("cosine" if queries.mask is None else "maxsim")
        return similarity(queries, documents)  # (Q, C)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Gathered:
        """Q local queries, D local documents -> rows and columns. Collectives run in the same order everywhere."""
        across = self.cross_device_negatives and labels.in_batch
        relations = Relations.gather(labels, across)
        local_queries = relations.local(relations.query_counts)
        candidates = gather_embeddings(documents, relations.document_counts)
        matrices = relations.matrix(local_queries, slice(None), self.mask_duplicates)  # (Q, C) each
        reads_scores = "score" in self.loss.reads
        targets = relations.targets(local_queries, slice(None)) if reads_scores else None
        forward = Gathered(queries, candidates, *matrices, relations, targets)
        if not self.symmetric or not labels.in_batch:
            return forward
        all_queries = gather_embeddings(queries, relations.query_counts)
        local_documents = relations.local(relations.document_counts)
        relevance, valid = relations.matrix(slice(None), local_documents, self.mask_duplicates)  # (M, D) each
        positive = (labels.relevance > 0).nonzero().squeeze(1)  # (P,)
        counts = gather_counts(len(positive), positive.device)
        reverse = Gathered(
            documents.rows(positive),
            all_queries,
            relevance.T[positive],
            valid.T[positive],
            relations,
            relations.targets(slice(None), local_documents).T[positive] if reads_scores else None,
            weight=len(positive) * len(counts) / sum(counts),
        )
        return replace(forward, reverse=reverse)

    def truncate(self, gathered: Gathered, size: int) -> Gathered:
        return replace(
            gathered,
            queries=gathered.queries.truncate(size),
            candidates=gathered.candidates.truncate(size),
            reverse=None if gathered.reverse is None else self.truncate(gathered.reverse, size),
        )

    def compare(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._direction(gathered)
        if gathered.reverse is not None:
            loss = (loss + self._direction(gathered.reverse)[0]) / 2
        return loss, metrics

    def view(self, gathered: Gathered) -> View:
        """Of the direction from queries to documents."""
        similarities = self.similarity_of(gathered.queries, gathered.candidates)  # (Q, C)
        relevance, valid = gathered.relevance.to(similarities.dtype), gathered.valid
        masked: dict[str, Tensor] = {}
        if self.mask_duplicates:
            relations = gathered.relations
            reasons = relations.reasons(relations.local(relations.query_counts), slice(None))
            masked = {reason: cells.float().mean() for reason, cells in reasons.items()}
        if self.false_negative_margin is not None:
            above = valid & self._false_negatives(similarities, relevance, valid)
            masked["margin"] = above.float().mean()
            valid = valid & ~above
        chance = self._chance(relevance, valid, gathered.targets)
        if gathered.reverse is not None:
            reverse = gathered.reverse
            chance = (chance + self._chance(reverse.relevance, reverse.valid, reverse.targets) * reverse.weight) / 2
        return View(gathered.queries, gathered.candidates, similarities, relevance, valid, masked, chance)

    def _chance(self, relevance: Tensor, valid: Tensor, targets: Tensor | None) -> Tensor:
        equal = torch.zeros(relevance.shape, device=relevance.device)
        return self.loss(Scores(equal, relevance, valid, targets)).mean()

    def _direction(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        similarities = self.similarity_of(gathered.queries, gathered.candidates)  # (Q, C)
        relevance, valid = gathered.relevance.to(similarities.dtype), gathered.valid
        if self.false_negative_margin is not None:
            valid = valid & ~self._false_negatives(similarities.detach(), relevance, valid)
        scores = Scores(similarities * self.temperature.scale(), relevance, valid, gathered.targets)
        return self.loss(scores).mean() * gathered.weight, self._metrics(similarities.detach(), scores)

    def _false_negatives(self, similarities: Tensor, relevance: Tensor, valid: Tensor) -> Tensor:
        positive = valid & (relevance > 0)  # (Q, C)
        best = similarities.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)  # (Q, 1)
        return ~positive & (similarities > best + (self.false_negative_margin or 0.0))

    @torch.no_grad()
    def _metrics(self, similarities: Tensor, scores: Scores) -> dict[str, Tensor]:
        positive, negative = scores.positive, scores.valid & (scores.relevance <= 0)
        top = similarities.masked_fill(~scores.valid, float("-inf")).argmax(1, keepdim=True)  # (Q, 1)
        metrics = {
            "accuracy": positive.gather(1, top).float().mean(),
            "positive_similarity": _masked_mean(similarities, positive),
            "negative_similarity": _masked_mean(similarities, negative),
            "negatives": negative.sum(1).float().mean(),
        }
        if self.temperature.learn:
            metrics["temperature"] = 1 / torch.as_tensor(self.temperature.scale())
        return metrics


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)
