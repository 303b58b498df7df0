"""Base of the objectives that look at vectors, not at scores: what pulls, spreads, whitens or matches distributions.

Every query stands beside its positives in the order of their relevance (of equals, in the order of the record): the
first is its partner, an objective that compares more views takes the next ones. Across processes all pairs are gathered
with gradients, and the loss of the gathered pairs is the same number everywhere. An objective is one file with one
method, `term`. Cost of the base: a sort of the keys, and (N, N) booleans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.objectives.gather import gather_counts, gather_rows, world
from mmembed.objectives.relations import gather_positive_keys

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


Momentum = Annotated[float, Field(gt=0, le=1)]  # of a teacher: the share of its weights that stays in a step


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of N pairs, without gradients, as pooled.

    views: (2 + F, N, E), of query, positive and the further ones. negatives: (N, H, E).
    """

    views: Tensor
    negatives: Tensor

    @property
    def unit_views(self) -> Tensor:
        """On the unit sphere, (2 + F, N, E)."""
        return functional.normalize(self.views, dim=-1)


@dataclass(frozen=True)
class Pairs:
    """N pairs of all processes, row i of everything belongs together; vectors as pooled, not normalised.

    queries, positives: (N, E).
    further: (F, N, E), the next positives, as many as the objective asks for.
    negatives: (N, H, E), the hard negatives, of an objective that takes them; else H is 0.
    has_negative: (N, H) bool; false on padding, and on what equals the query or a positive of it.
    negative_keys: (N, H, 2) int64, hashes of content and id of each.
    query_keys: (N,) int64, hashes of the queries' contents.
    view_keys: (N, 1 + F, 2) int64, hashes of content and id of each positive.
    positive_keys: (N, P, 2) int64, of the documents known to be relevant, drawn or not.
    same: (N, N) bool, true where two pairs share a content or a class, or one knows the other's positive as its own:
        they are no negatives of each other. True on the diagonal.
    local: rows of this process.
    left_out: share of the queries with a positive that have too few of them.
    enough: whether there are as many pairs as the objective needs; where not, the batch has a loss of 0.
    label_keys: (N, L, D) int64, the label paths of each pair as `BatchLabels.label_keys`, of an objective that takes
        them; else L and D are 0.
    label_values: (N,) float, the number of each pair's label, of an objective that takes labels; else None.
    source: the name of the data source, for messages.
    taught: the teacher's vectors, of an objective that has one.
    """

    queries: Tensor
    positives: Tensor
    further: Tensor
    negatives: Tensor
    has_negative: Tensor
    negative_keys: Tensor
    query_keys: Tensor
    view_keys: Tensor
    positive_keys: Tensor
    same: Tensor
    local: slice
    left_out: float
    enough: bool
    label_keys: Tensor
    label_values: Tensor | None
    source: str
    taught: Taught | None

    @property
    def unit(self) -> tuple[Tensor, Tensor]:
        """Both sides on the unit sphere, (N, E) each."""
        return functional.normalize(self.queries, dim=-1), functional.normalize(self.positives, dim=-1)

    @property
    def unit_views(self) -> Tensor:
        """Query, positive and the further ones on the unit sphere, (2 + F, N, E)."""
        return functional.normalize(torch.cat([torch.stack([self.queries, self.positives]), self.further]), dim=-1)

    def knows(self, keys: Tensor) -> Tensor:
        """(M, 2) keys of documents -> (N, M) bool: a positive of the pair, or its query."""
        contents, ids = torch.cat([self.view_keys, self.positive_keys], dim=1).unbind(-1)  # (N, V + P) each
        return meet(torch.cat([self.query_keys[:, None], contents], dim=1), keys[:, :1]) | meet(ids, keys[:, 1:])


class Aligned(Objective):
    """Base: `gather`, `truncate` and the monitors' view are here, `term` is the method.

    The first `positives_needed` positives of a query are compared; a query with fewer is left out.
    """

    many_vectors: bool | None = False  # None: of several vectors an input it compares the `mean_vector`
    takes_negatives = False
    takes_labels: ClassVar[bool] = False  # label paths of the records

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"labels"}) if self.takes_labels else frozenset()

    @property
    def across_processes(self) -> bool:
        return True

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """-> scalar loss over all pairs, detached scalar metrics."""
        raise NotImplementedError

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        queries, documents = mean_vector(queries), mean_vector(documents)
        return functional.normalize(queries.vectors, dim=-1) @ functional.normalize(documents.vectors, dim=-1).T

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Pairs:
        """A batch in which too few queries have the positives asked for has a loss of 0.

        Raises ConfigError, naming source and objective: several vectors an input, in-batch negatives that the source
        forbids, too few queries, no labels, or no vectors of the teacher that it needs."""
        if queries.mask is not None and self.many_vectors is False:
            raise ConfigError(
                f"objective '{self.name}' compares one vector an input; pooling 'multi_vector' gives many"
            )
        queries, documents, labels = mean_vector(queries), mean_vector(documents), labels.taught_as(mean_vector)
        if self.contrasts and not labels.in_batch:
            raise ConfigError(alone(self.name, labels.source))
        groups = group_documents(labels)
        found = [query for query, (positives, _) in enumerate(groups) if len(positives) >= self.positives_needed]
        device = labels.owner.device
        counts = gather_counts(len(found), device)
        with_any = sum(gather_counts(sum(bool(positives) for positives, _ in groups), device))
        self._check_enough(with_any, labels.source)
        rows = torch.tensor(found, dtype=torch.long, device=device)  # (n,)
        firsts = [groups[query][0][: self.positives_needed] for query in found]
        views = torch.tensor(firsts, dtype=torch.long, device=device).view(-1, self.positives_needed)  # (n, 1 + F)
        vectors = gather_rows(documents.vectors[views], counts)  # (N, 1 + F, E)
        index, has_negative, negative_keys = self._negatives(labels, rows, groups, counts)
        query_keys = gather_rows(labels.query_keys[rows], counts)
        view_keys = gather_rows(labels.document_keys[views], counts)
        positive_keys = gather_positive_keys(labels.positive_keys[rows], counts)
        start = sum(counts[: world()[0]]) if len(counts) > 1 else 0
        return Pairs(
            queries=gather_rows(queries.vectors[rows], counts),
            positives=vectors[:, 0],
            further=vectors[:, 1:].transpose(0, 1),
            negatives=_groups(documents.vectors, index, counts),
            has_negative=has_negative,
            negative_keys=negative_keys,
            query_keys=query_keys,
            view_keys=view_keys,
            positive_keys=positive_keys,
            same=same_content(query_keys, view_keys, positive_keys),
            local=slice(start, start + len(found)),
            left_out=1 - sum(counts) / max(with_any, 1),
            enough=sum(counts) >= self.least_pairs,
            label_keys=self._label_keys(labels, rows, counts),
            label_values=self._label_values(labels, rows, counts),
            source=labels.source,
            taught=self._taught(labels, rows, views, index, counts),
        )

    def check(self, sources: Sequence[Source]) -> None:
        if self.contrasts:
            check_in_batch(self.name, sources)
        for source in sources if self.takes_labels else ():
            if source.fields.isdisjoint(("labels", "classes")):
                raise ConfigError(self._unlabelled(source.name))

    def _unlabelled(self, source: str) -> str:
        return (
            f"objective '{self.name}' compares labels, source '{source}' has none; give its records `labels`, or read "
            "it with format: labelled"
        )

    def _label_keys(self, labels: BatchLabels, rows: Tensor, counts: list[int]) -> Tensor:
        """(N, L, D) of all processes, which may differ in L and D."""
        if not self.takes_labels:
            return rows.new_zeros(sum(counts), 0, 0)
        keys = rows.new_zeros(len(rows), 0, 0) if labels.label_keys is None else labels.label_keys[rows]
        most, deepest = (max(gather_counts(size, rows.device)) for size in keys.shape[1:])
        if not most:
            raise ConfigError(self._unlabelled(labels.source))
        missing = (0, deepest - keys.shape[2], 0, most - keys.shape[1])
        return gather_rows(functional.pad(keys, missing), counts)

    def _label_values(self, labels: BatchLabels, rows: Tensor, counts: list[int]) -> Tensor | None:
        """(N,) of all processes, NaN where a label is no number."""
        if not self.takes_labels:
            return None
        values = labels.label_values
        mine = torch.full(rows.shape, math.nan, device=rows.device) if values is None else values[rows]
        return gather_rows(mine, counts)

    def _check_enough(self, queries: int, source: str) -> None:
        if queries < self.least_pairs:
            raise ConfigError(
                f"objective '{self.name}': source '{source}' gives {queries} pairs a batch, it needs "
                f"{self.least_pairs}; raise training.per_device_train_batch_size"
            )

    def _taught(
        self, labels: BatchLabels, rows: Tensor, views: Tensor, negatives: Tensor, counts: list[int]
    ) -> Taught | None:
        """The teacher's vectors of the queries (n,), of their positives (n, 1 + F) and negatives (n, H)."""
        if self.teacher_momentum is None:
            return None
        if labels.taught is None:
            raise ConfigError(
                f"objective '{self.name}' learns from a teacher (momentum {self.teacher_momentum:g}), and the labels "
                "of the batch hold no vectors of one (`taught`); mmembed's trainer gives them, a step of your own "
                "passes `teacher` to contrastive_step"
            )
        queries, documents = (side.vectors for side in labels.taught)
        of_pairs = torch.cat([queries[rows].unsqueeze(1), documents[views]], dim=1)  # (n, 2 + F, E)
        return Taught(gather_rows(of_pairs, counts).transpose(0, 1), _groups(documents, negatives, counts))

    def _negatives(
        self, labels: BatchLabels, rows: Tensor, groups: list[Group], counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n,) of this process -> their hard negatives by number (n, H); of all, which exist (N, H), their keys
        (N, H, 2)."""
        if not self.takes_negatives:
            none = rows.new_zeros(sum(counts), 0, 2)  # (N, 0, 2)
            return rows.new_zeros(len(rows), 0), none[..., 0].bool(), none
        mine = [groups[query][1] for query in rows.tolist()]
        most = max(gather_counts(max(map(len, mine), default=0), rows.device))
        padded = [row + [-1] * (most - len(row)) for row in mine]
        index = torch.tensor(padded, dtype=torch.long, device=rows.device).view(len(mine), most)  # (n, H)
        keys = labels.document_keys[index]  # (n, H, 2)
        known = (keys[:, :, None] == labels.positive_keys[rows][:, None]).any(-1).any(-1)  # (n, H)
        exists = (index >= 0) & ~known & (keys[..., 0] != labels.query_keys[rows][:, None])
        return index, gather_rows(exists.long(), counts).bool(), gather_rows(keys, counts)

    def truncate(self, gathered: Pairs, dims: slice) -> Pairs:
        taught = gathered.taught
        return replace(
            gathered,
            queries=gathered.queries[:, dims],
            positives=gathered.positives[:, dims],
            further=gathered.further[..., dims],
            negatives=gathered.negatives[..., dims],
            taught=None if taught is None else Taught(taught.views[..., dims], taught.negatives[..., dims]),
        )

    def compare(self, gathered: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """In 32 bits, whatever the vectors have: determinants, eigenvalues and small distances do not survive 16.

        Parameters may have 16 bits (an engine casts them); a term brings them to the vectors' type."""
        gathered = _in_32_bits(gathered)
        if not gathered.enough:
            nothing = 0 * (gathered.queries.sum() + gathered.positives.sum())  # a part of the graph, in every process
            return nothing, {"left_out": torch.tensor(gathered.left_out, device=nothing.device)}
        with torch.autocast(gathered.queries.device.type, enabled=False):
            loss, metrics = self.term(gathered)
        metrics = {
            "positive_similarity": functional.cosine_similarity(gathered.queries, gathered.positives).mean().detach(),
            **metrics,
        }
        if gathered.left_out:
            metrics["left_out"] = torch.tensor(gathered.left_out, device=loss.device)
        return loss, metrics

    @torch.no_grad()
    def remember(self, gathered: Pairs) -> None:
        if gathered.enough:
            super().remember(gathered)

    def view(self, gathered: Pairs) -> View:
        """Local queries against all positives; who shares a content is no negative."""
        own, others = Embeddings(gathered.queries[gathered.local]), Embeddings(gathered.positives)
        index = torch.arange(len(gathered.positives), device=own.vectors.device)
        relevance = (index[gathered.local][:, None] == index[None, :]).float()  # (Q, N)
        valid = (relevance > 0) | ~gathered.same[gathered.local]
        return View(own, others, self.similarity_of(own, others), relevance, valid, {}, None)


def _in_32_bits(pairs: Pairs) -> Pairs:
    if pairs.queries.dtype not in (torch.bfloat16, torch.float16):
        return pairs
    taught = pairs.taught
    return replace(
        pairs,
        queries=pairs.queries.float(),
        positives=pairs.positives.float(),
        further=pairs.further.float(),
        negatives=pairs.negatives.float(),
        taught=None if taught is None else Taught(taught.views.float(), taught.negatives.float()),
    )


def mean_vector(embeddings: Embeddings) -> Embeddings:
    """One vector an input: of several, the unit vector of the mean of their directions.

    >>> several = Embeddings(torch.tensor([[[3.0, 0.0], [0.0, 2.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]]))
    >>> mean_vector(several).vectors
    tensor([[0.7071, 0.7071]])
    """
    if embeddings.mask is None:
        return embeddings
    directions = functional.normalize(embeddings.vectors, dim=-1) * embeddings.mask.unsqueeze(-1)  # (B, T, E)
    return Embeddings(functional.normalize(directions.sum(1), dim=-1))


def _groups(vectors: Tensor, index: Tensor, counts: list[int]) -> Tensor:
    """(D, E) of this process, (n, H) -> (N, H, E) of all; nothing is sent where H is 0."""
    if not index.shape[1]:
        return vectors.new_zeros(sum(counts), 0, vectors.shape[1])
    return gather_rows(vectors[index], counts)


def check_in_batch(objective: str, sources: Sequence[Source]) -> None:
    """Raises ConfigError where a source forbids that its documents are negatives of other queries."""
    for source in sources:
        if not source.source.in_batch_negatives:
            raise ConfigError(alone(objective, source.name))


def alone(objective: str, source: str) -> str:
    """The message for a source whose queries meet their own documents only."""
    return (
        f"objective '{objective}': the pairs of a batch are negatives of each other, but source '{source}' has "
        "in_batch_negatives: false; train it with another objective"
    )


Group = tuple[list[int], list[int]]


def group_documents(labels: BatchLabels) -> list[Group]:
    """(positives, negatives) of each query: documents by number, the most relevant first, of equals the first."""
    groups: list[Group] = [([], []) for _ in range(len(labels.query_keys))]
    relevance = labels.relevance.tolist()
    for document, query in enumerate(labels.owner.tolist()):
        groups[query][relevance[document] <= 0].append(document)
    return [(sorted(positives, key=lambda one: -relevance[one]), negatives) for positives, negatives in groups]


def same_content(query_keys: Tensor, view_keys: Tensor, positive_keys: Tensor) -> Tensor:
    """(N,), (N, V, 2), (N, P, 2) keys -> (N, N) bool, as `Pairs.same`."""
    contents, ids = torch.cat([view_keys, positive_keys], dim=1).unbind(-1)  # (N, V + P) each
    own = torch.cat([query_keys[:, None], view_keys[..., 0]], dim=1)  # (N, 1 + V)
    same = torch.zeros(len(own), len(own), dtype=torch.bool, device=own.device)
    for rows, columns in (
        _matches(torch.cat([query_keys[:, None], contents], dim=1), own),
        _matches(ids, view_keys[..., 1]),
    ):
        same[rows, columns] = same[columns, rows] = True
    return same


def meet(left: Tensor, right: Tensor) -> Tensor:
    """(N, A), (M, B) int64 keys -> (N, M) bool: which rows have a key in common.

    >>> meet(torch.tensor([[1, 2], [3, 3]]), torch.tensor([[2], [3], [4]]))
    tensor([[ True, False, False],
            [False,  True, False]])
    """
    met = torch.zeros(len(left), len(right), dtype=torch.bool, device=left.device)
    met[_matches(left, right)] = True
    return met


def _matches(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (N, A) and (M, B) that have a key in common, (K,) each: by sorting, for most have none."""
    left = left.sort(1).values
    first_time = torch.cat([torch.ones_like(left[:, :1], dtype=torch.bool), left[:, 1:] != left[:, :-1]], dim=1)
    rows, wanted = first_time.nonzero()[:, 0], left[first_time]
    keys, order = right.flatten().sort()  # (M B,)
    start = torch.searchsorted(keys, wanted)
    count = torch.searchsorted(keys, wanted, right=True) - start
    within = torch.arange(int(count.sum()), device=left.device) - (count.cumsum(0) - count).repeat_interleave(count)
    found = order[start.repeat_interleave(count) + within] // max(right.shape[1], 1)
    return rows.repeat_interleave(count), found


def drawn(deviation: float, seed: int, *shape: int) -> Tensor:
    """Normal numbers for the first values of parameters, the same in all processes and on any device."""
    return deviation * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def generator_at(seed: int, step: int) -> torch.Generator:
    """Of a step's random numbers, the same in all processes and after a resume."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)  # the CPU's generator takes 32 bits
