"""Graded pairs (STS): the similarities of all pairs of a batch against their gold, in one row.

L = loss(x, y),  x_i = s(q_i, d_i) / tau,  y_i = gold of pair i

Each query meets its own documents only; N pairs give Scores of one row (1, N): values = similarity / temperature,
relevance = the gold similarity in [0, 1]. So a loss that ranks candidates ranks pairs. Nothing is gathered from other
processes, as in CoDiEmb (arXiv 2508.11442, training code): each process has the loss of its own pairs, and gradients
are averaged. Cost: a pass over the N pairs' vectors; late interaction makes (Q, N) similarities, of which N are read.

When: the data are graded pairs (STS); choose the loss by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmembed.content import Task
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Loss, Scores
from mmembed.losses.pearson import correlation
from mmembed.objectives import Objective, View
from mmembed.objectives.similarity import PRODUCTS_OF, Similarity, get_similarity
from mmembed.objectives.temperature import Temperature

if TYPE_CHECKING:
    from mmembed.data.streaming import Source

TEMPERATURE = 0.05
SIMILAR = 0.5  # gold from which the health monitors call a pair similar


@dataclass(frozen=True)
class GatheredPairs:
    """Q queries and the N documents of this process; `owner` (N,) is the query of each, `gold` (N,) how similar."""

    queries: Embeddings
    documents: Embeddings
    owner: Tensor
    gold: Tensor


class GradedPairs(Objective):
    """Any loss over one row of graded pairs.

    Args:
        loss: name or block of a loss.
        temperature: a number (default 0.05, CoDiEmb's for `rank_kl` and `pro`), or `{value, learn}`. Not with
            `pearson`, which it would not change.
        similarity: cosine, dot, maxsim, maxsim_mean; default cosine for one vector an input, maxsim for several.
    """

    name = "pairs"

    def __init__(
        self,
        loss: str | Mapping[str, Any] = "pearson",
        temperature: float | Mapping[str, Any] | None = None,
        similarity: str | None = None,
    ) -> None:
        super().__init__()
        self.loss = LOSSES.build(loss)
        _refuse(self.loss)
        if temperature is not None and not self.loss.tempered:
            raise ConfigError(
                f"objective.temperature: {temperature} has no effect with loss '{self.loss.name}', which is the same "
                "for similarities of any scale; remove it"
            )
        self.temperature = Temperature(TEMPERATURE if temperature is None else temperature)
        self.similarity = similarity if similarity is None else get_similarity(similarity)

    @property
    def reads(self) -> frozenset[str]:
        return self.loss.reads

    @property
    def title(self) -> str:
        return self.loss.name

    @property
    def pairs(self) -> bool:
        return True

    def check(self, sources: Sequence[Source]) -> None:
        check_pairs(self.loss.name, sources)
        for source in sources:
            if source.grades.low == source.grades.high:
                raise ConfigError(
                    f"data source '{source.name}': all pairs have the same similarity {source.grades.low:g}; objective "
                    f"'{self.loss.name}' compares degrees. Remove the source, or look at how its scores are read"
                )
            if self.loss.needs_grades and source.grades.distinct < 3:
                raise ConfigError(
                    f"data source '{source.name}': its similarities are {source.grades.low:g} and "
                    f"{source.grades.high:g} only; objective '{self.loss.name}' compares degrees. Train on the similar "
                    "pairs with a contrastive objective"
                )

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self._similarity(queries)(queries, documents)  # (Q, N)

    def _similarity(self, embeddings: Embeddings) -> Similarity:
        return self.similarity or get_similarity("cosine" if embeddings.mask is None else "maxsim")

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> GatheredPairs:
        """Raises ConfigError for a single pair: there is nothing to compare it with."""
        if len(labels.owner) < 2:
            raise ConfigError(
                f"objective '{self.loss.name}': source '{labels.source}' gives one pair a batch, it compares pairs; "
                "raise training.per_device_train_batch_size or the source's batch_size"
            )
        return GatheredPairs(queries, documents, labels.owner, labels.relevance)

    def truncate(self, gathered: GatheredPairs, dims: slice) -> GatheredPairs:
        return replace(gathered, queries=gathered.queries.truncate(dims), documents=gathered.documents.truncate(dims))

    def compare(self, gathered: GatheredPairs) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self._scores(gathered)
        found, _ = correlation(scores)
        metrics = {
            "correlation": found.detach().squeeze(0),
            "pairs": torch.tensor(float(len(gathered.owner)), device=gathered.gold.device),
        }
        if self.temperature.learn:
            metrics["temperature"] = 1 / torch.as_tensor(self.temperature.scale()).detach()
        return self.loss(scores).squeeze(0), metrics

    def view(self, gathered: GatheredPairs) -> View:
        """A pair of gold SIMILAR or more counts as positive, another as negative. Equal scores have no loss to know."""
        similarities = self.similarity_of(gathered.queries, gathered.documents)  # (Q, N)
        index = torch.arange(len(similarities), device=gathered.owner.device)
        own = index[:, None] == gathered.owner[None, :]  # (Q, N)
        similar = (own & (gathered.gold >= SIMILAR)).to(similarities.dtype)
        return View(gathered.queries, gathered.documents, similarities, similar, own, {}, None)

    def _scores(self, gathered: GatheredPairs) -> Scores:
        """(1, N), in float32 at least: in bfloat16 different golds would become ties."""
        own = self._own_similarities(gathered)
        own = own.to(torch.promote_types(own.dtype, torch.float32)) * self.temperature.scale()
        gold = gathered.gold.to(own.dtype)
        return Scores(own[None], gold[None], torch.ones(1, len(own), dtype=torch.bool, device=own.device))

    def _own_similarities(self, gathered: GatheredPairs) -> Tensor:
        """Of each document with its query, (N,)."""
        side = PRODUCTS_OF.get(self._similarity(gathered.queries))
        if side is not None:
            return (side(gathered.queries)[gathered.owner] * side(gathered.documents)).sum(-1)
        similarities = self.similarity_of(gathered.queries, gathered.documents)  # (Q, N)
        return similarities[gathered.owner, torch.arange(len(gathered.owner), device=gathered.owner.device)]


def _refuse(loss: Loss) -> None:
    """Raises ConfigError for a loss that has nothing to compare in one row of pairs and their similarities."""
    why = _unsuited(type(loss))
    if why:
        suited = ", ".join(name for name, one in LOSSES.classes().items() if not _unsuited(one))
        raise ConfigError(
            f"objective 'pairs': loss '{loss.name}' {why}; take one of {suited}, or write {{type: {loss.name}}} for "
            "queries with candidates"
        )


def _unsuited(loss: type[Loss]) -> str:
    if loss.couples_rows:
        return "compares the rows of several queries, and graded pairs are one row"
    if "score" in loss.reads:
        return "learns from a teacher's 'score' of each document, and graded pairs have a similarity only"
    if "relevance" not in loss.reads:
        return "tells positives from negatives only, and graded pairs have degrees"
    return ""


def check_pairs(name: str, sources: Sequence[Source]) -> None:
    """Raises ConfigError for a source whose relevances are no similarities of pairs, and for an option that it ignores.

    Args:
        name: of the objective, for the message.
    """
    for source in sources:
        if source.tasks != {Task.STS}:
            tasks = ", ".join(sorted(source.tasks))
            raise ConfigError(
                f"data source '{source.name}' ({tasks}): objective '{name}' is for graded pairs. Use a contrastive "
                "objective for it (objective: {by_task: ...} has one a task), or set the source's task to sts where "
                "its relevances are similarities from 0 to 1"
            )
        if source.grades.high > 1:
            raise ConfigError(
                f"data source '{source.name}': a similarity is {source.grades.high:g}; objective '{name}' takes 0 to "
                "1. Divide by the highest, or read it with format pairs and its options low and high"
            )
        given = source.source.model_fields_set
        if "in_batch_negatives" in given and source.source.in_batch_negatives:  # false says what is so
            raise ConfigError(
                f"data source '{source.name}': in_batch_negatives: true has no effect with objective '{name}', where "
                "pairs are compared with pairs; remove it"
            )
