"""Who is relevant to whom, and who counts, over the documents of all processes.

Three kinds of other queries' documents are no negatives and are masked when asked: a known positive of the query (in
the batch or not), the positive of another query with the same content, and the query's own content. Documents are the
same by content or by id, so equal texts under different ids are found. Cost: 2 P + 2 comparisons of (Q, C) integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.objectives.gather import gather_counts, gather_rows, world


@dataclass(frozen=True)
class Relations:
    """Labels of all processes: M queries, C documents; `owner` counts queries over all processes."""

    owner: Tensor  # (C,)
    relevance: Tensor  # (C,)
    scores: Tensor  # (C,), NaN where no teacher gave one
    document_keys: Tensor  # (C, 2)
    query_keys: Tensor  # (M,)
    positive_keys: Tensor  # (M, P, 2)
    query_counts: list[int]
    document_counts: list[int]
    in_batch: bool

    @classmethod
    def gather(cls, labels: BatchLabels, across: bool) -> Relations:
        """Of all processes, or of this one alone."""
        device = labels.owner.device
        scores = torch.full_like(labels.relevance, math.nan) if labels.scores is None else labels.scores
        queries, documents = len(labels.query_keys), len(labels.owner)
        query_counts = gather_counts(queries, device) if across else [queries]
        document_counts = gather_counts(documents, device) if across else [documents]
        offset = sum(query_counts[: world()[0]]) if across else 0
        return cls(
            owner=gather_rows(labels.owner + offset, document_counts),
            relevance=gather_rows(labels.relevance, document_counts),
            scores=gather_rows(scores, document_counts),
            document_keys=gather_rows(labels.document_keys, document_counts),
            query_keys=gather_rows(labels.query_keys, query_counts),
            positive_keys=gather_positive_keys(labels.positive_keys, query_counts),
            query_counts=query_counts,
            document_counts=document_counts,
            in_batch=labels.in_batch,
        )

    def local(self, counts: list[int]) -> slice:
        """This process's slice of rows counted by `counts`."""
        start = 0 if len(counts) == 1 else sum(counts[: world()[0]])
        return slice(start, start + counts[0 if len(counts) == 1 else world()[0]])

    def matrix(self, queries: slice, documents: slice, mask_duplicates: bool) -> tuple[Tensor, Tensor]:
        """-> relevance (Q, C) float, valid (Q, C) bool, for these queries and documents."""
        query_index, own, relevance = self._grid(queries, documents)
        valid = own if not self.in_batch else torch.ones_like(own)
        if mask_duplicates:
            masked = self._known_positives(query_index, documents) | self._same_query(query_index, documents, own)
            valid = valid & ((relevance > 0) | ~masked)
        return relevance, valid

    def targets(self, queries: slice, documents: slice) -> Tensor:
        """(Q, C) float: what a teacher gave each query's own documents, NaN elsewhere."""
        _, own, _ = self._grid(queries, documents)
        return torch.where(own, self.scores[documents][None, :], math.nan)

    def queries_apart(self, queries: slice, mask_duplicates: bool) -> Tensor:
        """(Q, M) bool: the other queries that a query may be pushed away from.

        `mask_duplicates` leaves out those of the same content and those whose positive is known to answer the query.
        """
        index = torch.arange(len(self.query_keys), device=self.owner.device)  # (M,)
        apart = index[queries][:, None] != index[None, :]
        if mask_duplicates:
            positive = (self.relevance > 0).nonzero().squeeze(1)  # (P,)
            shared = self._known_positives(index[queries], slice(None))[:, positive].float()  # (Q, P)
            answered = torch.zeros(apart.shape, device=apart.device).index_add_(1, self.owner[positive], shared) > 0
            apart &= ~answered & (self.query_keys[queries][:, None] != self.query_keys[None, :])
        return apart

    def documents_apart(self, documents: slice, mask_duplicates: bool) -> Tensor:
        """(D, C) bool: the documents of other queries that a positive document may be pushed away from.

        `mask_duplicates` leaves out what would be no negative of the document's own query.
        """
        query_index = self.owner[documents]  # (D,)
        own = query_index[:, None] == self.owner[None, :]  # (D, C)
        apart = ~own
        if mask_duplicates:
            apart &= ~self._known_positives(query_index, slice(None))
            apart &= ~self._same_query(query_index, slice(None), own)
        return apart

    def turns(self) -> Tensor:
        """(C,) long: 0 for the first positive of its query in the batch, 1 for the second, ...; -1 for a negative."""
        seen: dict[int, int] = {}
        found = []
        for owner, positive in zip(self.owner.tolist(), (self.relevance > 0).tolist(), strict=True):
            found.append(seen.get(owner, 0) if positive else -1)
            seen[owner] = seen.get(owner, 0) + positive
        return torch.tensor(found, device=self.owner.device)

    def reasons(self, queries: slice, documents: slice) -> dict[str, Tensor]:
        """Why `mask_duplicates` takes a candidate out -> (Q, C) bool; a cell has one reason."""
        query_index, own, relevance = self._grid(queries, documents)
        counts = (own if not self.in_batch else torch.ones_like(own)) & (relevance <= 0)
        known = self._known_positives(query_index, documents)
        same = self._same_query(query_index, documents, own)
        return {"known_positive": counts & known, "duplicate": counts & same & ~known}

    def _grid(self, queries: slice, documents: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the queries (Q,), whose document a column is (Q, C) bool, relevance (Q, C)."""
        query_index = torch.arange(len(self.query_keys), device=self.owner.device)[queries]  # (Q,)
        own = query_index[:, None] == self.owner[documents][None, :]  # (Q, C)
        return query_index, own, torch.where(own, self.relevance[documents][None, :], 0.0)

    def _known_positives(self, query_index: Tensor, documents: slice) -> Tensor:
        """(Q, C) bool: documents that the query has as a positive, by content or by id, drawn or not."""
        keys = self.document_keys[documents]  # (C, 2)
        known = torch.zeros(len(query_index), len(keys), dtype=torch.bool, device=keys.device)
        for positive_keys in self.positive_keys[query_index].unbind(1):  # (Q, 2) each; P is small
            for column in (0, 1):
                known |= keys[None, :, column] == positive_keys[:, None, column]
        return known

    def _same_query(self, query_index: Tensor, documents: slice, own: Tensor) -> Tensor:
        """(Q, C) bool: the query's own content, and what answers another query of the same content."""
        query_keys = self.query_keys[query_index][:, None]  # (Q, 1)
        answers = (self.relevance[documents] > 0)[None, :] & (
            self.query_keys[self.owner[documents]][None, :] == query_keys
        )
        return (self.document_keys[documents][None, :, 0] == query_keys) | (answers & ~own)


def gather_positive_keys(keys: Tensor, counts: list[int]) -> Tensor:
    """(Q, P, 2) of each process, which may differ in P -> of all; rows with fewer repeat their last."""
    if len(counts) > 1:
        missing = max(gather_counts(keys.shape[1], keys.device)) - keys.shape[1]
        keys = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], dim=1)  # (Q, P, 2)
    return gather_rows(keys, counts)
