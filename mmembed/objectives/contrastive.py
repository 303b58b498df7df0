"""Contrastive objective: each local query against the candidates of all processes.

L = mean_i loss(S_i, R_i),  S_ij = s(q_i, d_j) / tau,  R_ij = relevance of document j to query i

`symmetric` averages in the other direction (each positive document against all queries), as CLIP does. Where queries
have different numbers of positives, a process's reverse loss weighs as many as it has, so that the mean over processes
is the mean over all positives. A loss that couples its rows gets the queries of all processes, so that it is the same
number everywhere. Cost: three products of (Q, E) and (C, E), one float and one bool a cell of (Q, C), and the loss in
blocks of rows; a few (Q, C) of floats more for losses that couple rows and for late interaction.

When: any loss over scores is wanted, with its similarity, masks, temperature and direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Distilled, Scores
from mmembed.objectives import Objective, View
from mmembed.objectives.blocks import blocked_mean
from mmembed.objectives.gather import gather_counts, gather_embeddings
from mmembed.objectives.guide import Guide
from mmembed.objectives.relations import Relations
from mmembed.objectives.similarity import PRODUCTS_OF, Similarity, dot, get_similarity, unit
from mmembed.objectives.temperature import Temperature

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


PLACEHOLDERS = 8  # teacher's scores that are one number: fewer may be chance


@dataclass(frozen=True)
class Gathered:
    """Rows and columns of the two score matrices; the reverse one only where the objective is symmetric."""

    queries: Embeddings  # Q local, or of all processes
    candidates: Embeddings  # C of all processes
    relevance: Tensor  # (Q, C)
    valid: Tensor  # (Q, C)
    relations: Relations  # of the labels
    rows: slice  # of the queries of all processes
    targets: Tensor | None = None  # (Q, C), for a loss that reads scores
    siblings: Embeddings | None = None  # S more columns: inputs of the rows' own side
    apart: Tensor | None = None  # (Q, S), which of them are negatives
    turns: Tensor | None = None  # (C,) which positive of its query a candidate is, -1 for a negative; where it matters
    guide: tuple[Embeddings, Embeddings] | None = None  # a teacher's vectors of the rows and of the (C + S) columns
    reverse: Gathered | None = None  # rows are positive documents, columns are the queries of all processes
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
        same_tower_negatives: the other queries are negatives too, and other queries' documents in the reverse direction
            (DCL, arXiv 2110.06848; GTE, arXiv 2308.03281). Not for sources with in-batch negatives off.
        false_negative_margin: negatives whose similarity is above the best positive's + margin do not count (0.1 in
            Qwen3-Embedding, arXiv 2506.05176, section 2).
        guide: a second judge, by which negatives do not count that it rates above the positive (GIST): a block of
            `momentum` (1: the model that training starts from; below: one that follows it; null: the data's `score`)
            or `model` (another embedder), `margin` and `strategy` (`absolute`, `relative`), see
            `mmembed.objectives.guide`.
        positives: `together` (default) shows a loss all positives of a query at once; `one_at_a_time` takes the k-th of
            every query with all negatives, the other positives being left out for everybody, and averages over k
            (CoDiEmb, arXiv 2508.11442, training code). It acts on the direction from queries to documents.
    """

    name = "contrastive"
    needs_candidates = True

    def __init__(
        self,
        loss: str | Mapping[str, Any] = "infonce",
        temperature: float | Mapping[str, Any] = 0.05,
        similarity: str | None = None,
        symmetric: bool = False,
        cross_device_negatives: bool = True,
        mask_duplicates: bool = True,
        same_tower_negatives: bool = False,
        false_negative_margin: float | None = None,
        guide: Mapping[str, Any] | None = None,
        positives: Literal["together", "one_at_a_time"] = "together",
    ) -> None:
        super().__init__()
        self.loss = LOSSES.build(loss)
        if self.loss.objective == "pairs":
            raise ConfigError(
                f"objective '{self.name}': loss '{self.loss.name}' compares graded pairs with each other, and not the "
                f"candidates of a query; write {{type: {self.loss.name}}} for graded pairs, or take another loss"
            )
        self.temperature = Temperature(temperature)
        self.similarity = similarity if similarity is None else get_similarity(similarity)
        self.guide = Guide.of(guide)
        self._refuse_two_judges()
        if self.similarity in PRODUCTS_OF or self.teacher_momentum is not None:
            self.many_vectors = False
        self.contrasts, self.least_candidates = mask_duplicates, self.loss.least_candidates
        self.wants_lengths = self.similarity is dot and self.loss.defaults.get("similarity") == "dot"
        self.symmetric, self.cross_device_negatives = symmetric, cross_device_negatives
        self.mask_duplicates, self.false_negative_margin = mask_duplicates, false_negative_margin
        self.same_tower_negatives, self.positives = same_tower_negatives, positives
        if false_negative_margin is not None and false_negative_margin < 0:
            raise ConfigError(
                f"objective.false_negative_margin: {false_negative_margin} would mask true negatives; use 0 or more"
            )

    def _refuse_two_judges(self) -> None:
        """Raises ConfigError where the loss reads a teacher's scores itself: what a guide says would be mixed in."""
        if self.guide is not None and "score" in self.loss.reads:
            raise ConfigError(
                f"objective '{self.loss.name}'.guide: the loss has a teacher of its own, whose scores it compares; "
                "remove the guide, or take a loss without a teacher (infonce, dcl, ...)"
            )

    @property
    def reads(self) -> frozenset[str]:
        by_score = self.guide is not None and self.guide.by_score
        return self.loss.reads | {"score"} if by_score else self.loss.reads

    @property
    def title(self) -> str:
        return self.loss.name

    @property
    def needs_grades(self) -> bool:
        return self.loss.needs_grades

    @property
    def distils(self) -> Distilled | None:
        return "sides" if self.guide is not None and self.guide.by_score else self.loss.distils

    @property
    def teacher_momentum(self) -> float | None:
        return self.loss.guide_momentum if self.guide is None else self.guide.momentum

    @property
    def guide_model(self) -> str | None:
        return None if self.guide is None else self.guide.model

    @property
    def across_processes(self) -> bool:
        return self.cross_device_negatives

    def check(self, sources: Sequence[Source]) -> None:
        self._refuse_idle(sources)
        for source in sources:
            if "score" in self.reads and "score" not in source.fields and self.teacher_momentum is None:
                wants = "learns from a teacher's. Score its documents with a teacher, or train on it with infonce"
                if self.guide is not None:
                    wants = "has a guide that goes by it (momentum: null). Score its documents, or give it a momentum"
                raise ConfigError(f"data source '{source.name}' carries no 'score'; objective '{self.title}' {wants}")
            grades = source.grades
            if self.loss.needs_grades and grades.distinct + (grades.low > 0) < 3:
                raise ConfigError(
                    f"data source '{source.name}' tells relevant from not, no degrees; objective '{self.loss.name}' "
                    "compares degrees. Train on it with infonce, or give its documents graded relevances"
                )

    def _refuse_idle(self, sources: Sequence[Source]) -> None:
        """Raises ConfigError for options of the config that act between queries, where no source has them meet."""
        if not sources or any(source.source.in_batch_negatives for source in sources):
            return
        for option, on in (("same_tower_negatives", self.same_tower_negatives), ("symmetric", self.symmetric)):
            if on and option in self.written:
                names = ", ".join(f"'{source.name}'" for source in sources)
                raise ConfigError(
                    f"objective '{self.title}'.{option}: true has no effect, its queries meet their own documents only "
                    f"(in_batch_negatives: false of data source {names}); remove it, or allow in-batch negatives"
                )

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self._similarity(queries)(queries, documents)  # (Q, C)

    def _similarity(self, embeddings: Embeddings) -> Similarity:
        return self.similarity or get_similarity("cosine" if embeddings.mask is None else "maxsim")

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Gathered:
        """Q local queries, D local documents -> rows and columns. Collectives run in the same order everywhere.

        Raises ConfigError where a teacher's scores are needed and are all one number, and where a guide is needed and
        gave no vectors, or several an input.
        """
        if "score" in self.reads:
            self._refuse_placeholders(labels)
        coupled, siblings = self.loss.couples_rows, self.same_tower_negatives and labels.in_batch
        across = self.cross_device_negatives and (labels.in_batch or coupled)
        reversed_too = self.symmetric and labels.in_batch
        relations = Relations.gather(labels, across)
        candidates = gather_embeddings(documents, relations.document_counts)
        all_queries = queries
        if coupled or siblings or reversed_too:
            all_queries = gather_embeddings(queries, relations.query_counts)
        rows = slice(None) if coupled else relations.local(relations.query_counts)
        forward = Gathered(
            all_queries if coupled else queries,
            candidates,
            *relations.matrix(rows, slice(None), self.mask_duplicates),
            relations,
            rows,
            relations.targets(rows, slice(None)) if "score" in self.reads else None,
            all_queries if siblings else None,
            relations.queries_apart(rows, self.mask_duplicates) if siblings else None,
            relations.turns() if self.positives == "one_at_a_time" else None,
        )
        guided = self.teacher_momentum is not None or self.guide_model is not None
        judged = self._judged(labels, relations) if guided else None
        if judged is not None:
            columns = [judged[1], *([judged[0]] if siblings else [])]
            of_rows = judged[0].rows(torch.arange(len(judged[0].vectors), device=labels.owner.device)[rows])
            forward = replace(forward, guide=(of_rows, Embeddings.concatenate(columns)))
        if not reversed_too:
            return forward
        return replace(forward, reverse=self._reverse(forward, all_queries, documents, judged))

    def _judged(self, labels: BatchLabels, relations: Relations) -> tuple[Embeddings, Embeddings]:
        """The guide's vectors of the queries (M, E) and documents (C, E) of all processes."""
        if self.guide_model is not None:
            if labels.guide is None:
                raise ConfigError(
                    f"objective '{self.title}'.guide: the labels of the batch hold no vectors of '{self.guide_model}' "
                    "(`guide`); mmembed's trainer gives them, a step of your own puts them into the labels"
                )
            of_queries, of_documents = (Embeddings(one.to(labels.owner.device)) for one in labels.guide)
            return (
                gather_embeddings(of_queries, relations.query_counts),
                gather_embeddings(of_documents, relations.document_counts),
            )
        if labels.taught is None:
            raise ConfigError(
                f"objective '{self.title}' has a guide (momentum {self.teacher_momentum:g}), and the labels of the "
                "batch hold no vectors of one (`taught`); mmembed's trainer gives them, a step of your own passes "
                "`teacher` to contrastive_step"
            )
        if labels.taught[0].mask is not None:
            raise ConfigError(
                f"objective '{self.title}': its guide compares one vector an input; pooling 'multi_vector' gives many"
            )
        queries, documents = labels.taught
        return (
            gather_embeddings(queries, relations.query_counts),
            gather_embeddings(documents, relations.document_counts),
        )

    def _refuse_placeholders(self, labels: BatchLabels) -> None:
        found = labels.relevance.new_zeros(0) if labels.scores is None else labels.scores[~labels.scores.isnan()]
        if len(found) >= PLACEHOLDERS and bool((found == found[0]).all()):
            raise ConfigError(
                f"data source '{labels.source}': all {len(found)} scores of a batch are {found[0].item():g}; objective "
                f"'{self.loss.name}' learns from a teacher's. Look at how its 'score' is read, or train with infonce"
            )

    def _reverse(
        self,
        forward: Gathered,
        all_queries: Embeddings,
        documents: Embeddings,
        judged: tuple[Embeddings, Embeddings] | None,
    ) -> Gathered:
        """The same with positive documents as rows: local ones, or of all processes where the loss couples them."""
        relations = forward.relations
        local = relations.local(relations.document_counts)
        positive = (relations.relevance[local] > 0).nonzero().squeeze(1)  # (P,)
        counts = gather_counts(len(positive), positive.device)
        rows, weight = documents.rows(positive), len(positive) * len(counts) / max(sum(counts), 1)
        if self.loss.couples_rows and len(relations.document_counts) > 1:
            rows, local, weight = gather_embeddings(rows, counts), slice(None), 1.0
            positive = (relations.relevance > 0).nonzero().squeeze(1)
        relevance, valid = relations.matrix(slice(None), local, self.mask_duplicates)  # (M, D) each
        targets = None if forward.targets is None else relations.targets(slice(None), local).T[positive]
        apart = guide = None
        if judged is not None:
            index = torch.arange(len(judged[1].vectors), device=positive.device)[local][positive]
            columns = [judged[0], *([judged[1]] if forward.siblings is not None else [])]
            guide = judged[1].rows(index), Embeddings.concatenate(columns)
        if forward.siblings is not None:
            apart = relations.documents_apart(local, self.mask_duplicates)[positive]
        return Gathered(
            rows,
            all_queries,
            relevance.T[positive],
            valid.T[positive],
            relations,
            local,
            targets,
            None if apart is None else forward.candidates,
            apart,
            guide=guide,
            weight=weight,
        )

    def truncate(self, gathered: Gathered, dims: slice) -> Gathered:
        guide = gathered.guide
        if guide is not None and self.guide_model is None:  # a teacher has the dimensions of the model
            guide = guide[0].truncate(dims), guide[1].truncate(dims)
        return replace(
            gathered,
            queries=gathered.queries.truncate(dims),
            candidates=gathered.candidates.truncate(dims),
            siblings=None if gathered.siblings is None else gathered.siblings.truncate(dims),
            guide=guide,
            reverse=None if gathered.reverse is None else self.truncate(gathered.reverse, dims),
        )

    def compare(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._direction(gathered)
        if gathered.reverse is not None:
            loss = (loss + self._direction(gathered.reverse)[0]) / 2
        return loss, metrics

    def view(self, gathered: Gathered) -> View:
        """Of the direction from queries to documents."""
        scores = self._all_scores(gathered)
        documents = slice(gathered.valid.shape[1])
        masked: dict[str, Tensor] = {}
        if self.mask_duplicates:
            reasons = gathered.relations.reasons(gathered.rows, slice(None))
            masked = {reason: cells.float().mean() for reason, cells in reasons.items()}
        by_guide = self._judged_false(gathered, slice(None), self._targets(gathered, slice(None)), scores.relevance)
        if by_guide is not None:
            masked["guide"] = by_guide[:, documents].float().mean()
        if self.false_negative_margin is not None:
            left = gathered.valid if by_guide is None else gathered.valid & ~by_guide[:, documents]
            masked["margin"] = (left & ~scores.valid[:, documents]).float().mean()
        chance = self._chance(scores, gathered.turns)
        if gathered.reverse is not None:
            chance = (chance + self._chance(self._all_scores(gathered.reverse)) * gathered.reverse.weight) / 2
        return View(
            gathered.queries,
            gathered.candidates,
            scores.values[:, documents] * scores.temperature,
            scores.relevance[:, documents],
            scores.valid[:, documents],
            masked,
            chance,
        )

    def _chance(self, scores: Scores, turns: Tensor | None = None) -> Tensor:
        return self._losses(replace(scores, values=torch.zeros_like(scores.values)), turns).mean()

    def _losses(self, scores: Scores, turns: Tensor | None) -> Tensor:
        """(Q,) losses: of all positives, or the mean of those of each turn that a row has a positive in."""
        if turns is None:
            return self.loss(scores)
        turns = functional.pad(turns, (0, scores.values.shape[1] - len(turns)), value=-1)  # siblings are negatives
        total = 0 * scores.values.sum(1)  # (Q,), of the graph also where no row has a positive
        taken = torch.zeros_like(total)
        for turn in range(int(turns.max()) + 1):
            now = turns == turn  # (C + S,)
            shown = replace(scores, relevance=scores.relevance * now, valid=scores.valid & (now | (turns < 0)))
            total = total + self.loss(shown)
            taken += shown.positive.any(1)
        return total / taken.clamp_min(1)

    def _direction(self, gathered: Gathered) -> tuple[Tensor, dict[str, Tensor]]:
        """In blocks of rows where similarities are a product and the loss takes each row for itself."""
        side = PRODUCTS_OF.get(self._similarity(gathered.queries))
        if side is None or self.loss.couples_rows or next(self.loss.parameters(), None) is not None:
            scores = self._all_scores(gathered)
            loss = self._losses(scores, gathered.turns).mean() * gathered.weight
            return loss, self._metrics([self._tally(scores, gathered)])
        scale, tallies = self.temperature.scale(), []

        def losses_of(values: Tensor, rows: slice, temperature: Tensor) -> Tensor:
            scores = self._scores(gathered, values, rows, temperature)
            tallies.append(self._tally(scores, gathered))
            return self._losses(scores, gathered.turns)

        left, right = side(gathered.queries) * scale, side(gathered.candidates)  # (Q, E), (C, E)
        if gathered.siblings is not None:
            right = torch.cat([right, side(gathered.siblings)])  # (C + S, E)
        temperature = 1 / torch.as_tensor(scale, dtype=left.dtype, device=left.device)
        loss = blocked_mean(left, right, temperature, losses_of)
        return loss * gathered.weight, self._metrics(tallies)

    def _all_scores(self, gathered: Gathered) -> Scores:
        """Of all rows at once."""
        similarities = self.similarity_of(gathered.queries, gathered.candidates)  # (Q, C)
        if gathered.siblings is not None:
            more = self.similarity_of(gathered.queries, gathered.siblings)  # (Q, S)
            similarities = torch.cat([similarities, more], 1)
        scale = self.temperature.scale()
        return self._scores(gathered, similarities * scale, slice(None), 1 / scale)

    def _scores(self, gathered: Gathered, values: Tensor, rows: slice, temperature: Tensor | float) -> Scores:
        """What the loss sees of some rows; values (b, C + S), S more columns where siblings are negatives."""
        relevance, valid = self._counted(gathered, rows)
        targets, relevance = self._targets(gathered, rows), relevance.to(values.dtype)
        false = self._judged_false(gathered, rows, targets, relevance)
        if false is not None:
            valid = valid & ~false
        if self.false_negative_margin is not None:
            valid = valid & ~self._false_negatives(values.detach() * temperature, relevance, valid)
        return Scores(values, relevance, valid, targets if "score" in self.loss.reads else None, temperature)

    @staticmethod
    def _counted(gathered: Gathered, rows: slice) -> tuple[Tensor, Tensor]:
        """Relevance and which candidates count of some rows, before any judge, (b, C + S) each."""
        relevance, valid = gathered.relevance[rows], gathered.valid[rows]  # (b, C)
        if gathered.apart is None:
            return relevance, valid
        apart = gathered.apart[rows]  # (b, S)
        return functional.pad(relevance, (0, apart.shape[1])), torch.cat([valid, apart], 1)

    def _targets(self, gathered: Gathered, rows: slice) -> Tensor | None:
        """(b, C + S), what a teacher gave, or a guide; None where nobody is asked."""
        targets = None if gathered.targets is None else gathered.targets[rows]
        if gathered.apart is not None and targets is not None:
            targets = functional.pad(targets, (0, gathered.apart.shape[1]), value=math.nan)
        if gathered.guide is None:
            return targets
        of_rows, of_columns = (unit(side) for side in gathered.guide)  # (Q, E), (C + S, E)
        judged = of_rows[rows] @ of_columns.T
        return judged if targets is None else torch.where(targets.isnan(), judged, targets)

    def _judged_false(
        self, gathered: Gathered, rows: slice, targets: Tensor | None, relevance: Tensor
    ) -> Tensor | None:
        """(b, C + S) bool, the negatives that the objective's guide takes for positives; None without a guide."""
        if self.guide is None or targets is None:
            return None
        return self.guide.false_negatives(targets, relevance, self._counted(gathered, rows)[1])

    def _false_negatives(self, similarities: Tensor, relevance: Tensor, valid: Tensor) -> Tensor:
        positive = valid & (relevance > 0)  # (Q, C)
        best = similarities.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)  # (Q, 1)
        return ~positive & (similarities > best + (self.false_negative_margin or 0.0))

    @torch.no_grad()
    def _tally(self, scores: Scores, gathered: Gathered) -> Tensor:
        """Sums over some rows, in the order that `_metrics` reads; a hit is a positive above all other documents."""
        documents = gathered.valid.shape[1]
        values = scores.values.to(torch.promote_types(scores.values.dtype, torch.float32))
        rows, columns = scores.cells
        of_positives = values[rows, columns]  # (P,)
        lowest = torch.full_like(values[:, 0], float("-inf"))  # (b,)
        best = lowest.scatter_reduce(0, rows, of_positives, "amax")
        others = torch.where(scores.negative, values, float("-inf"))[:, :documents].amax(1)  # (b,)
        found = values.sum() - of_positives.sum()
        if not bool(scores.valid.all()):
            found = torch.where(scores.negative, values, 0.0).sum()
        sums = [
            values.new_tensor(len(values)),
            (best > others).sum(),
            of_positives.sum() * scores.temperature,
            values.new_tensor(len(rows)),
            found * scores.temperature,
            scores.negative.sum(),
        ]
        return torch.stack([one.to(values.dtype) for one in sums])

    @torch.no_grad()
    def _metrics(self, tallies: Sequence[Tensor]) -> dict[str, Tensor]:
        sums = torch.stack(list(tallies)).sum(0) if tallies else torch.zeros(6)
        count, hits, of_positives, positives, of_negatives, negatives = sums
        metrics = {
            "accuracy": hits / count,
            "positive_similarity": of_positives / positives.clamp_min(1),
            "negative_similarity": of_negatives / negatives.clamp_min(1),
            "negatives": negatives / count,
        }
        if self.temperature.learn:
            metrics["temperature"] = 1 / torch.as_tensor(self.temperature.scale())
        return metrics
