"""Who is relevant to whom, and who counts, over the documents of all processes.

Three kinds of other queries' documents are no negatives and are masked when asked: a known positive of the query (in
the batch or not), the positive of another query with the same content, and the query's own content. Documents are the
same by content or by id, so equal texts under different ids are found. Cost: a few (Q, C) of booleans.
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
        owner, grades = self.owner[documents], self.relevance[documents]  # (C,) each
        row = torch.full_like(self.query_keys, -1)  # (M,)
        row[query_index] = torch.arange(len(query_index), device=row.device)
        columns = (row[owner] >= 0).nonzero().squeeze(1)
        rows = row[owner[columns]]
        own = torch.zeros(len(query_index), len(owner), dtype=torch.bool, device=row.device)
        relevance = torch.zeros(own.shape, dtype=grades.dtype, device=row.device)
        own[rows, columns], relevance[rows, columns] = True, grades[columns]
        return query_index, own, relevance

    def _known_positives(self, query_index: Tensor, documents: slice) -> Tensor:
        """(Q, C) bool: documents that the query has as a positive, by content or by id, drawn or not."""
        keys, positive_keys = self.document_keys[documents], self.positive_keys[query_index]  # (C, 2), (Q, P, 2)
        known = torch.zeros(len(query_index), len(keys), dtype=torch.bool, device=keys.device)
        for column in (0, 1):
            mark_members(known, positive_keys[:, :, column], keys[:, column])
        return known

    def _same_query(self, query_index: Tensor, documents: slice, own: Tensor) -> Tensor:
        """(Q, C) bool: the query's own content, and what answers another query of the same content."""
        query_keys = self.query_keys[query_index][:, None]  # (Q, 1)
        same = torch.zeros_like(own)
        if len(self.query_keys.unique()) < len(self.query_keys):
            positive = (self.relevance[documents] > 0).nonzero().squeeze(1)  # (P,)
            answers = torch.zeros(len(own), len(positive), dtype=torch.bool, device=own.device)
            mark_members(answers, query_keys, self.query_keys[self.owner[documents][positive]])
            same[:, positive] = answers & ~own[:, positive]
        mark_members(same, query_keys, self.document_keys[documents][:, 0])
        return same


def mark_members(marks: Tensor, sets: Tensor, keys: Tensor) -> None:
    """Sets marks (Q, C) to true where the row's set, sets (Q, K), holds the column's key, keys (C,).

    By a table of the distinct keys: K comparisons a cell would be slow for sets that a few keys are in.
    """
    if not len(keys):
        return
    distinct, place = torch.unique(keys, return_inverse=True)  # (U,), (C,)
    found = torch.searchsorted(distinct, sets.contiguous()).clamp_max(len(distinct) - 1)  # (Q, K)
    rows, members = (distinct[found] == sets).nonzero(as_tuple=True)
    found = found[rows, members]
    if len(distinct) == len(keys):
        marks[rows, place.argsort()[found]] = True
        return
    table = torch.zeros(len(marks), len(distinct), dtype=torch.bool, device=marks.device)
    table[rows, found] = True
    marks |= table[:, place]


def gather_positive_keys(keys: Tensor, counts: list[int]) -> Tensor:
    """(Q, P, 2) of each process, which may differ in P -> of all; rows with fewer repeat their last."""
    if len(counts) > 1:
        missing = max(gather_counts(keys.shape[1], keys.device)) - keys.shape[1]
        keys = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], dim=1)  # (Q, P, 2)
    return gather_rows(keys, counts)
