"""Base of the objectives that look at vectors, not at scores: what pulls, spreads, whitens or matches distributions.

Every query stands beside its positive of the highest relevance (the first of equals). Across processes all pairs are
gathered with gradients, and the loss of the gathered pairs is the same number everywhere. An objective is one file with
one method, `term`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.objectives.gather import gather_counts, gather_rows, world


@dataclass(frozen=True)
class Pairs:
    """N pairs of all processes, row i of both belongs together; vectors as pooled, not normalised.

    queries, positives: (N, E).
    query_keys: (N,) int64, hashes of the queries' contents.
    document_keys: (N,) int64, hashes of the positives' contents.
    local: rows of this process.
    """

    queries: Tensor
    positives: Tensor
    query_keys: Tensor
    document_keys: Tensor
    local: slice

    @property
    def unit(self) -> tuple[Tensor, Tensor]:
        """Both sides on the unit sphere, (N, E) each."""
        return functional.normalize(self.queries, dim=-1), functional.normalize(self.positives, dim=-1)


class Aligned(Objective):
    """Base: `gather`, `truncate` and the monitors' view are here, `term` is the method."""

    least_pairs: ClassVar[int] = 1  # with fewer the term is not defined

    @property
    def across_processes(self) -> bool:
        return True

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """-> scalar loss over all pairs, detached scalar metrics."""
        raise NotImplementedError

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return functional.normalize(queries.vectors, dim=-1) @ functional.normalize(documents.vectors, dim=-1).T

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Pairs:
        """Raises ConfigError for several vectors an input, and for fewer pairs than the term needs."""
        if queries.mask is not None:
            raise ConfigError(
                f"objective '{self.name}' compares one vector an input; pooling 'multi_vector' gives many"
            )
        chosen, found = first_positives(labels)  # (Q,), (P,) queries that have one
        counts = gather_counts(len(found), chosen.device)
        start = sum(counts[: world()[0]]) if len(counts) > 1 else 0
        if sum(counts) < self.least_pairs:
            raise ConfigError(
                f"objective '{self.name}': source '{labels.source}' gives {sum(counts)} pairs a batch, it needs "
                f"{self.least_pairs}; raise training.per_device_train_batch_size"
            )
        return Pairs(
            gather_rows(queries.vectors[found], counts),
            gather_rows(documents.vectors[chosen], counts),
            gather_rows(labels.query_keys[found], counts),
            gather_rows(labels.document_keys[chosen, 0], counts),
            slice(start, start + len(found)),
        )

    def truncate(self, gathered: Pairs, size: int) -> Pairs:
        return replace(gathered, queries=gathered.queries[:, :size], positives=gathered.positives[:, :size])

    def compare(self, gathered: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        return self.term(gathered)

    def view(self, gathered: Pairs) -> View:
        """Local queries against all positives; whoever shares a key is no negative."""
        own = Embeddings(gathered.queries[gathered.local])
        others = Embeddings(gathered.positives)
        index = torch.arange(len(gathered.positives), device=own.vectors.device)
        relevance = (index[gathered.local][:, None] == index[None, :]).float()  # (Q, N)
        same = gathered.document_keys[gathered.local][:, None] == gathered.document_keys[None, :]
        same |= gathered.query_keys[gathered.local][:, None] == gathered.query_keys[None, :]
        valid = (relevance > 0) | ~same
        return View(own, others, self.similarity_of(own, others), relevance, valid, {}, None)


def first_positives(labels: BatchLabels) -> tuple[Tensor, ...]:
    """The document of the highest relevance of each query that has one -> documents (P,), their queries (P,)."""
    best: dict[int, int] = {}
    relevance = labels.relevance.tolist()
    for document, query in enumerate(labels.owner.tolist()):
        if relevance[document] > (relevance[best[query]] if query in best else 0):
            best[query] = document
    order = sorted(best)
    chosen = torch.tensor([[best[query], query] for query in order], dtype=torch.long, device=labels.owner.device)
    return chosen.view(-1, 2).unbind(1)
