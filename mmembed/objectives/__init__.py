"""Objectives: embeddings + labels -> a scalar and metrics.

An objective owns what a loss must not know: the gather across processes, the similarity, the temperature, the masks of
duplicates and false negatives. Local queries meet the candidates of all processes through a differentiable gather and
the loss is the mean over local queries; the training step averages gradients over processes, so no world-size factor
appears anywhere. One file per objective; `build_objective(block)` reads the YAML block.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mmembed.content import Role, Task
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings, Layer
from mmembed.errors import ConfigError, nearest
from mmembed.losses import LOSSES, Distilled
from mmembed.registry import Registry

if TYPE_CHECKING:
    from mmembed.data.streaming import Source

PER_BATCH = ("by_task", "by_source")


@dataclass(frozen=True)
class View:
    """What health monitors look at of one comparison: Q local queries, C candidates.

    similarities, relevance, valid: (Q, C), without temperature; `valid` after all masks.
    masked: why candidates were taken out -> the share of all cells.
    chance: the loss if all scores were equal; None where that says nothing.
    """

    queries: Embeddings
    candidates: Embeddings
    similarities: Tensor
    relevance: Tensor
    valid: Tensor
    masked: dict[str, Tensor]
    chance: Tensor | None


class Objective(nn.Module):
    """Base of the objectives.

    `gather` runs the collectives once; `compare` turns what it gave into the loss and may run several times on
    truncated embeddings (matryoshka). `reads` names what is used of the labels beyond positive or not, `pairs` says
    that it takes graded pairs: all documents of a record, each with its similarity from 0 to 1 (STS). `layers` names
    the lower decoder layers whose vectors `gather` has to find in the embeddings, `predicts` the roles whose texts it
    has the model predict, `routes` says that it looks at where routers send tokens. One that looks at no vectors
    (`compares` is false) stands beside another in a list, and needs neither `similarity_of` nor `view` nor `truncate`.

    With a `teacher_momentum` the trainer holds a teacher, whose vectors of the batch are in `labels.taught`.

    An objective that remembers (a queue, temperatures, running means) keeps its memory in buffers, which are saved and
    resumed, and overrides `news` and `keep`. `compare` never changes it: a step that ran out of memory is taken again.
    """

    name: ClassVar[str]
    takes_negatives: bool = True  # documents of a record that are no positives; of others none are drawn
    many_vectors: bool | None = None  # an input is one vector (false), or several (true); None: either
    positives_needed: int = 1  # how many positives a query must have
    by_place: ClassVar[bool] = False  # which of a record's positives is which follows from their order
    needs_negatives: bool = False  # documents of a record that are no positives
    needs_order: bool = False  # documents of a record that differ in relevance
    needs_both: bool = False  # negatives in a source, not in each record: documents are judged one by one
    contrasts: bool = False  # pairs of a batch that share no content are negatives of each other
    needs_candidates: ClassVar[bool] = False  # a query's loss is 0 where nothing stands beside its positive
    wants_lengths: bool = False  # its dot products are on a teacher's scale: vectors of length 1 cannot reach it
    least_candidates: int = 1  # with fewer documents that a query meets its loss is 0
    idle_pairs: int = 0  # queries that a run trains on before this has a loss
    least_pairs: int = 1  # with fewer queries a batch, of all processes, it is not defined
    compares: ClassVar[bool] = True
    routes: bool = False  # looks at where the routers of a mixture of experts send tokens
    judges: bool = False  # logits of pairs of a query and a document: a reranker's
    answers: ClassVar[bool] = False  # predicts the answer of an in-context reranker
    keeps_vectors: ClassVar[bool] = False  # its memory is of whole vectors, of which shorter ones are prefixes
    written: frozenset[str] = frozenset()  # options that its block gives, not those that its loss brings

    def __init__(self) -> None:
        super().__init__()
        self._staged: list[Any] = []

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def title(self) -> str:
        """Its name in messages; of several, all names."""
        return self.name

    @property
    def pairs(self) -> bool:
        return False

    @property
    def distils(self) -> Distilled | None:
        """What it compares of the teacher's scores in the data, as `Loss.distils`."""
        return None

    @property
    def needs_grades(self) -> bool:
        """Whether it has nothing to learn from a query whose positives are all as relevant, as `Loss.needs_grades`."""
        return False

    @property
    def layers(self) -> frozenset[Layer]:
        return frozenset()

    @property
    def separable(self) -> bool:
        """Whether its loss is a sum of terms, each of one query and of the embeddings of that query and its own
        documents alone. The step then needs no second pass (`mmembed.training.gradcache`)."""
        return False

    @property
    def teacher_momentum(self) -> float | None:
        """Of a second set of weights that encodes each batch without gradients (`mmembed.training.teacher`): above 0,
        at most 1, which is the model that training starts from. None: it needs no teacher."""
        return None

    @property
    def guide_model(self) -> str | None:
        """An embedder whose vectors of the data it needs (`labels.guide`); None: it needs none."""
        return None

    @property
    def predicts(self) -> frozenset[Role]:
        return frozenset()

    @property
    def across_processes(self) -> bool:
        """Whether a query meets the documents of other processes."""
        return False

    def part_for(self, source: str, task: Task, or_first: bool = False) -> Objective:
        """What batches of this source are trained with: the objective itself, unless there is one a task or source.

        Args:
            or_first: where nothing is said of such a source, take the first; ConfigError without.
        """
        return self

    def check(self, sources: Sequence[Source]) -> None:
        """Raises ConfigError where it has nothing to learn from one of the sources, or would misread its labels."""

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        """Q queries, C documents -> (Q, C) similarities as the objective compares them, without temperature."""
        raise NotImplementedError

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Any:
        """Q local queries, D local documents -> what `compare` needs, from all processes."""
        raise NotImplementedError

    def truncate(self, gathered: Any, dims: slice) -> Any:
        """What `gather` gave, with embeddings cut to these dimensions: a prefix, or one of several layers' vectors that
        stand side by side."""
        raise NotImplementedError

    def compare(self, gathered: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """-> scalar loss (mean over local queries), detached scalar metrics."""
        raise NotImplementedError

    def view(self, gathered: Any) -> View:
        """What `gather` gave, for the health monitors."""
        raise NotImplementedError

    def news(self, gathered: Any) -> Any:
        """What a batch adds to the memory, equal in all processes; None: nothing. Called without gradients."""
        return None

    def keep(self, news: Any) -> None:
        """Adds the `news` of a batch to the buffers."""

    @torch.no_grad()
    def remember(self, gathered: Any) -> None:
        """Stages the news of a batch whose gradient is taken; it counts from `commit` on."""
        news = self.news(gathered)
        if news is not None:
            self._staged.append(news)

    def commit(self) -> None:
        """The optimizer step is certain: keeps what its batches brought."""
        for news in self._staged:
            self.keep(news)
        self._staged.clear()

    def forget(self) -> None:
        """The optimizer step is taken again, or was a rehearsal: drops what its batches brought."""
        self._staged.clear()

    def forward(
        self, queries: Embeddings, documents: Embeddings, labels: BatchLabels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Q local queries and D local documents -> scalar loss, detached scalar metrics."""
        return self.compare(self.gather(queries, documents, labels))


def one_teacher(objectives: Mapping[str, Objective]) -> float | None:
    """The `teacher_momentum` that objectives (by name) have in common, leaving out those without; None: all of them.

    Raises:
        ConfigError: two differ.
    """
    found = {name: one.teacher_momentum for name, one in objectives.items() if one.teacher_momentum is not None}
    for name, momentum in found.items():
        first = next(iter(found))
        if momentum != found[first]:
            raise ConfigError(
                f"objective: '{first}' has momentum {found[first]:g} and '{name}' {momentum:g}, but a run holds one "
                "teacher; give both the same momentum"
            )
    return next(iter(found.values()), None)


OBJECTIVES: Registry[Objective] = Registry("mmembed.objectives", Objective, given=("embedding_size",))


ObjectiveBlock = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def build_objective(block: ObjectiveBlock, embedding_size: int | None = None, depth: int | None = None) -> Objective:
    """Builds what YAML says:

        contrastive                                             an objective by its name
        {type: wasserstein, temperature: .05}                   a loss by its name: contrastive (or pairs) with it;
                                                                what is not given is the loss's default, if it has one
        {type: contrastive, matryoshka: {dims: [256, 64]}}      `matryoshka` wraps any objective: shorter vectors,
        {type: contrastive, matryoshka: {layers: [2, -1]}}      those of lower layers, or both
        [{type: infonce}, {type: uniformity, weight: .1}]       a weighted sum
        [{type: infonce}, {type: infonce, layer: middle}]       whose parts may compare the vectors of lower layers
        [{type: infonce}, {type: captioning, weight: .5}]       one with a language-model loss
        {by_task: {retrieval: {type: infonce}, sts: pearson}}   one of the above for the batches of each task
        {by_source: {squad-en: {type: infonce}, ...}}           or of each source

    Args:
        embedding_size: of the vectors; the model's.
        depth: how many layers the decoder has; the model's. None, both: a config is only checked.

    Raises:
        ConfigError: unknown names and options, dims above `embedding_size`, a layer outside of `depth`, a sum of
            nothing, no objective that compares vectors.
    """
    from mmembed.objectives.combined import Combined, Part
    from mmembed.objectives.layers import layer_number

    if isinstance(block, Mapping) and block.keys() & set(PER_BATCH):
        return _build_per_batch(block, embedding_size, depth)
    if isinstance(block, str | Mapping):
        alone = _build_named("objective", block, embedding_size, depth)
        if not alone.compares:
            raise ConfigError(untaught(alone.name))
        return alone
    if not block:
        raise ConfigError("objective: the list is empty; name at least one objective, for example [contrastive]")
    parts: list[Part] = []
    for number, one in enumerate(block):
        options = {"type": one} if isinstance(one, str) else dict(one)
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"objective[{number}].weight: found {weight!r}; give a finite number above 0, or remove the part"
            )
        where, named = f"objective[{number}].layer", options.pop("layer", -1)
        if named != "middle" and (isinstance(named, bool) or not isinstance(named, int)):
            raise ConfigError(f"{where}: found {named!r}; give the number of a layer, or middle")
        layer = layer_number(cast("Layer", named), depth, where)
        objective = _build_named(f"objective[{number}]", options, embedding_size, depth)
        if layer is not None and objective.judges:
            raise ConfigError(f"{where}: '{options['type']}' reads the logits of the last layer; remove the layer")
        if layer is not None and objective.layers:
            raise ConfigError(f"{where}: the part has matryoshka.layers, too; keep one of them")
        name = str(options["type"])
        if layer is not None and not objective.compares:
            raise ConfigError(
                f"{where}: '{name}' looks at the last layer's tokens, and at no vectors; remove the layer"
            )
        alike = sum(part.name.split("-")[0] == name for part in parts)
        parts.append(Part(f"{name}-{alike + 1}" if alike else name, float(weight), objective, layer))
    return Combined(parts)


def _build_named(
    where: str, block: str | Mapping[str, Any], embedding_size: int | None, depth: int | None
) -> Objective:
    """`_build_one`, whose errors say which objective they are of: `objective 'infonce'.temperature: ...`.

    Args:
        where: `objective`, or which part of a list.
    """
    try:
        return _build_one(block, embedding_size, depth)
    except ConfigError as error:
        message, name = str(error), str(block if isinstance(block, str) else block.get("type"))
        if message.startswith("objective."):
            raise ConfigError(f"{where} '{name}'{message.removeprefix('objective')}") from None
        if where == "objective" and name in message:
            raise
        raise ConfigError(f"{where} '{name}': {message}") from None


def _build_one(block: str | Mapping[str, Any], embedding_size: int | None, depth: int | None) -> Objective:
    from mmembed.objectives.matryoshka import nested

    options = {"type": block} if isinstance(block, str) else dict(block)
    matryoshka = options.pop("matryoshka", None)
    if "layer" in options:
        raise ConfigError(
            "objective.layer: the embedder gives the vectors of the last layer, and something has to train those too: "
            "make it a part of a list, beside one without layer, for example [{type: infonce}, {type: infonce, layer: "
            "middle}]"
        )
    name = options.get("type")
    if isinstance(name, str) and name not in OBJECTIVES.classes() and name in LOSSES.classes():
        options = _with_loss(name, options)
    defaults = _defaults(options)
    if "similarity" in defaults.keys() - options.keys() and isinstance(matryoshka, Mapping) and "dims" in matryoshka:
        raise ConfigError(
            f"objective '{name}': matryoshka.dims with the default similarity '{defaults['similarity']}', which suits "
            "no cut unit vectors; name a similarity, cosine, or dot with normalize: false"
        )
    given = {} if embedding_size is None else {"embedding_size": embedding_size}  # none where a config is only checked
    objective = OBJECTIVES.build({**options, **defaults, **options}, **given)
    objective.written = frozenset(options)
    if matryoshka is None:
        return objective
    if objective.judges:
        raise ConfigError(f"objective '{name}': logits of pairs cannot be cut to be shorter; remove matryoshka")
    if not objective.compares:
        raise ConfigError(f"objective '{name}': looks at no vectors, so matryoshka has nothing to cut; remove it there")
    return nested(objective, matryoshka, embedding_size, depth)


def untaught(name: str) -> str:
    """What is wrong where no objective looks at vectors."""
    return (
        f"objective '{name}': looks at no vectors, and an embedder needs an objective that does; write a list with "
        f"both, for example [{{type: infonce}}, {{type: {name}, weight: 0.5}}]"
    )


def _build_per_batch(block: Mapping[str, Any], embedding_size: int | None, depth: int | None) -> Objective:
    from mmembed.objectives.per_batch import PerBatch

    by: Literal["by_task", "by_source"] = "by_task" if "by_task" in block else "by_source"
    entries = block[by]
    if len(block) > 1 or not isinstance(entries, Mapping):
        raise ConfigError(
            f"objective: {by} stands alone and holds an objective each, for example {{by_task: {{retrieval: infonce, "
            f"sts: pearson}}}}; found {dict(block)}"
        )
    objectives = {}
    for name, inner in entries.items():
        try:
            objectives[str(name)] = build_objective(inner, embedding_size, depth)
        except ConfigError as error:
            raise ConfigError(f"objective.{by}.{name}: {error}") from None
    return PerBatch(by, objectives)


def _with_loss(loss: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The block of the objective that a loss stands for, where the options of both stand side by side."""
    of_loss = set(inspect.signature(LOSSES.get(loss)).parameters)
    objective = LOSSES.get(loss).objective
    of_objective = set(inspect.signature(OBJECTIVES.get(objective)).parameters) - {"loss"}
    for key in options.keys() - {"type"} - of_objective - of_loss:
        raise ConfigError(f"objective '{loss}': unknown option '{key}'; {nearest(key, of_objective | of_loss)}")
    block = {key: value for key, value in options.items() if key in of_objective}
    return {**block, "type": objective, "loss": {k: v for k, v in options.items() if k not in of_objective}}


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the loss of an objective's block, a name or a block, sets of the options that the objective takes."""
    loss, objective = options.get("loss"), options.get("type")
    name = loss.get("type") if isinstance(loss, Mapping) else loss
    if not (isinstance(name, str) and name in LOSSES.classes()) or not isinstance(objective, str):
        return {}
    taken = inspect.signature(OBJECTIVES.get(objective)).parameters
    return {key: value for key, value in LOSSES.get(name).defaults.items() if key in taken}
