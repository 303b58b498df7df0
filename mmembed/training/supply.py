"""Whether a source holds what its objective compares: positives enough, negatives, a teacher's scores that differ.

Asked when the data were read, before weights are loaded: a batch that lacks them would come after minutes or hours, or
would train on nothing in silence. A source is refused where no record has what is needed; where some have not, they add
nothing to the objective, and a warning counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmembed.config.blocks import EmbedderConfig
from mmembed.content import Task
from mmembed.data.census import Census, Held, Some
from mmembed.data.dataset import RecordDataset
from mmembed.data.streaming import Source
from mmembed.errors import ConfigError
from mmembed.objectives import Objective
from mmembed.training.arguments import DEFAULTS


@dataclass(frozen=True)
class Group:
    """How many documents of either kind are drawn for a query at most, and how many queries meet in a batch; whether
    negatives are mined, so that records need not have any."""

    positives: int
    negatives: int
    queries: int
    mined: bool


@dataclass(frozen=True)
class Lack:
    """Records that do not have what an objective compares.

    what: what is wrong with them. remedy: what the objective wants, and what to do. alone: whether one such record
    teaches nothing; else it is wrong only where all are such.
    """

    those: Some
    what: str
    remedy: str
    alone: bool = True

    def told(self, census: Census) -> str:
        """How many they are, the first one's place, and what they lack."""
        count = "all" if self.those.number == census.records else f"{self.those.number:,} of"
        return f"{count} {census.records:,} records, the first at {self.those.first}, {self.what}"


def check_supply(dataset: Source, config: EmbedderConfig, part: Objective, processes: int) -> None:
    """Whether `part`, the objective of a source, has something to compare in it.

    Args:
        processes: that train together.

    Raises:
        ConfigError: no record has what a part compares, a batch has too few queries, or the run too few. The message
            names the source, the objective and the first record.
    """
    _check_run(dataset, config, part, processes)
    if part.pairs:
        alone = dataset.census.those(lambda held: held.positives + held.negatives < 2)
        if _group(dataset, config, part, 1).queries == 1 and alone.number:
            raise ConfigError(
                f"data source '{dataset.name}': one query a batch and process, and {alone.first} has one document; "
                f"objective '{part.title}' compares pairs with each other. {MORE_QUERIES}"
            )
        return
    for one in named_parts(part):
        group = _group(dataset, config, part, processes if one.across_processes else 1)
        for lack in _lacks(dataset.census, one, group):
            if lack.those.number == dataset.census.records:
                raise ConfigError(
                    f"data source '{dataset.name}': {lack.told(dataset.census)}; objective '{one.title}' {lack.remedy}"
                )
        _check_places(dataset, one, group)
        _check_batches(dataset, one, group)
        _check_candidates_enough(dataset, one, group)
        if one.contrasts:
            _check_distinct(dataset, one, group)
        if one.needs_candidates:
            _check_candidates(dataset, one, group)
        if "labels" in one.reads and dataset.census.labels < 2 <= dataset.census.records:
            raise ConfigError(
                f"data source '{dataset.name}': all records have the same labels; objective '{one.title}' compares "
                "those that differ. Look at how they are read, or train the source with another objective"
            )


def check_dev(dev: Sequence[RecordDataset], config: EmbedderConfig) -> None:
    """Raises ConfigError where a reranker has nothing to rank in a dev source: it ranks each query's own documents."""
    for dataset in dev if config.head is not None else ():
        alike = dataset.census.those(lambda held: not (held.negatives or held.graded))
        if alike.number == dataset.census.records and Task.STS not in dataset.tasks:
            raise ConfigError(
                f"data.dev '{dataset.name}': no record has two documents of different relevance, the first at "
                f"{alike.first}; a reranker ranks each query's own documents, and every order of these is right. Add "
                "documents of relevance 0 (python -m data_tools.mine_negatives)"
            )


def shortages(dataset: Source, config: EmbedderConfig, part: Objective) -> list[str]:
    """A warning for each objective that learns nothing of some records."""
    if part.pairs:
        return []
    group = _group(dataset, config, part, 1)
    return [
        f"data source '{dataset.name}': {lack.told(dataset.census)}; objective '{one.title}' learns little or nothing "
        "of them"
        for one in named_parts(part)
        for lack in _lacks(dataset.census, one, group)
        if lack.those.number and lack.alone
    ]


def named_parts(objective: Objective) -> Iterator[Objective]:
    """What an objective is made of, without sums and wrappers, which have no name."""
    for part in objective.modules():
        if isinstance(part, Objective) and "name" in vars(type(part)):
            yield part


MORE_QUERIES = "Raise training.per_device_train_batch_size, or the source's batch_size"


def _group(dataset: Source, config: EmbedderConfig, part: Objective, processes: int) -> Group:
    data, arguments = config.data, {**DEFAULTS, **config.training.arguments}
    rows = dataset.source.batch_size or int(arguments["per_device_train_batch_size"])
    negatives = data.train_group_size - data.positives_per_query if part.takes_negatives else 0
    return Group(data.positives_per_query, negatives, rows * processes, data.mining is not None)


def _lacks(census: Census, part: Objective, group: Group) -> Iterator[Lack]:
    """What records may lack of what a part compares, whether any does or not."""
    needed = part.positives_needed
    if needed > 1:
        yield Lack(
            census.those(lambda held: held.positives < needed),
            f"have fewer than {needed} positives",
            f"compares a query with {needed}: give the records further positives (another modality, caption or "
            "augmentation each), or train the source with another objective",
        )
    if part.needs_grades:
        yield Lack(
            census.those(lambda held: not held.graded or group.positives < 2),
            "have no positives of different relevance that are drawn for a query",
            "compares degrees of relevance: give the documents of a query degrees and set data.positives_per_query to "
            "2 or more, or train on it with infonce",
        )
    if part.needs_order:
        yield Lack(
            census.those(
                lambda held: not (min(held.negatives, group.negatives) or (held.graded and group.positives > 1))
            ),
            "have no two documents of different relevance that are drawn for a query",
            "puts the documents of a query in order: add documents of relevance 0 and raise data.train_group_size "
            "above data.positives_per_query, or give the positives degrees and set data.positives_per_query to 2 or "
            "more",
        )
    if (part.needs_negatives or part.needs_both) and not group.mined:
        yield Lack(
            census.those(lambda held: not min(held.negatives, group.negatives)),
            "have no negative" if group.negatives else "have no room for negatives in data.train_group_size",
            "needs hard negatives: add documents of relevance 0 and raise data.train_group_size above "
            "data.positives_per_query, or train the source with another objective",
            alone=part.needs_negatives,
        )
    if part.distils is not None:
        yield _unscored(census, part, group)


def _unscored(census: Census, part: Objective, group: Group) -> Lack:
    """What records lack of a teacher's scores: the scores, or a difference between them."""
    if part.distils == "negatives":
        missing = census.those(lambda held: not min(held.scored_negatives, group.negatives))
        return Lack(
            missing,
            "have no 'score' of a negative that is drawn",
            "leaves negatives out by it: score them, or set "
            "momentum: 1, whose guide is the model that training starts from",
        )
    sides = part.distils == "sides"
    wanted = "a positive and a negative" if sides else "two documents"

    def scored(held: Held) -> bool:
        both = bool(held.scored_positives and min(held.scored_negatives, group.negatives))
        return both if sides else held.scored(group.positives, group.negatives) > 1

    def differ(held: Held) -> bool:
        return held.sides_differ if sides else held.differ(group.positives, group.negatives)

    missing = census.those(lambda held: not scored(held))
    without = census.those(lambda held: not (scored(held) and differ(held)))
    if missing.number == without.number:
        what = f"have no 'score' of {wanted} that are drawn for a query"
    else:
        what = f"have no scores of {wanted} that differ"
    return Lack(
        without,
        what,
        "learns how a teacher tells the documents of a query apart: score all of them (data.positives_per_query and "
        "data.train_group_size say how many are drawn), look at how 'score' is read, or train on it with infonce and "
        "data.ignore_fields: [score]",
    )


def _check_places(dataset: Source, part: Objective, group: Group) -> None:
    """Raises ConfigError where some of a record's positives are drawn, and a part would take one for another."""
    if not part.by_place:
        return
    census = dataset.census
    more = census.those(lambda held: held.positives > group.positives)
    if more.number:
        raise ConfigError(
            f"data source '{dataset.name}': {more.number:,} of {census.records:,} records, the first at {more.first}, "
            f"have more than {group.positives} positives; objective '{part.title}' knows each by its place, and of "
            "more some are drawn. Raise data.positives_per_query to the most that a record has, or take the others out"
        )


def _check_batches(dataset: Source, part: Objective, group: Group) -> None:
    """Raises ConfigError where a batch has fewer queries than a part needs, or fewer on average that have its views."""
    census, needed = dataset.census, part.positives_needed
    if group.queries < part.least_pairs:
        raise ConfigError(
            f"data source '{dataset.name}': a batch has {group.queries} queries; objective '{part.title}' compares "
            f"{part.least_pairs} or more. {MORE_QUERIES}"
        )
    short = census.those(lambda held: held.positives < needed)
    usual = group.queries * (1 - short.number / census.records)
    if usual < part.least_pairs:
        raise ConfigError(
            f"data source '{dataset.name}': {short.number:,} of {census.records:,} records, the first at "
            f"{short.first}, have fewer than {needed} positives; objective '{part.title}' compares {part.least_pairs} "
            f"queries or more that have them, and a batch has {usual:.1f} of {group.queries} on average. Take such "
            f"records out, or {MORE_QUERIES[0].lower()}{MORE_QUERIES[1:]}"
        )


def _check_candidates_enough(dataset: Source, part: Objective, group: Group) -> None:
    """Raises ConfigError where a query cannot meet as many documents as a part needs."""
    most = (group.queries if dataset.source.in_batch_negatives else 1) * (group.positives + group.negatives)
    if most < part.least_candidates:
        raise ConfigError(
            f"data source '{dataset.name}': a query meets {most} documents at most; objective '{part.title}' needs "
            f"{part.least_candidates}, with fewer its loss is 0. Lower its options, or raise data.train_group_size or "
            "training.per_device_train_batch_size"
        )


def _check_run(dataset: Source, config: EmbedderConfig, part: Objective, processes: int) -> None:
    """Raises ConfigError where a part is still without a loss when the run ends."""
    arguments = {"max_steps": 0, "num_train_epochs": 3, "gradient_accumulation_steps": 1} | config.training.arguments
    rows = _group(dataset, config, part, processes).queries
    if int(arguments["max_steps"]) > 0:
        most = int(arguments["max_steps"]) * int(arguments["gradient_accumulation_steps"]) * rows
    elif len(config.data.train) == 1 and dataset.census.records:
        most = math.ceil(float(arguments["num_train_epochs"]) * dataset.census.records)
    else:  # how often a source comes is the mixing's business
        return
    for one in named_parts(part):
        if most < one.idle_pairs:
            raise ConfigError(
                f"data source '{dataset.name}': the run ends after {most:,} queries, and objective '{one.title}' has "
                f"no loss before it has seen {one.idle_pairs:,}. Lower its options (`episode`), or train longer"
            )


def _draws_negatives(dataset: Source, group: Group) -> bool:
    return group.negatives > 0 and (group.mined or dataset.census.those(lambda held: held.negatives > 0).number > 0)


def _check_distinct(dataset: Source, part: Objective, group: Group) -> None:
    """Raises ConfigError where in-batch negatives are all there are, and all records share their query or positive:
    these are no negatives of each other."""
    if part.takes_negatives and _draws_negatives(dataset, group):
        return
    keys = dataset.keys()
    if keys is None or len(keys) < 2:
        return
    for what, alike in zip(("query", "first positive"), (keys == keys[0]).all(0), strict=True):
        if alike:
            raise ConfigError(
                f"data source '{dataset.name}': all records have the same {what}, and what shares one is no negative "
                f"of another; objective '{part.title}' has nothing to compare. Look at how the source is read, or add "
                "documents of relevance 0"
            )


def _check_candidates(dataset: Source, part: Objective, group: Group) -> None:
    """Raises ConfigError where a query meets no document but its positives, and these differ in nothing."""
    in_batch = dataset.source.in_batch_negatives
    if in_batch and group.queries > 1:
        return
    if _draws_negatives(dataset, group):
        return
    graded = "relevance" in part.reads and "relevance" in dataset.fields
    if group.positives > 1 and (graded or part.distils is not None):
        return
    why = "one query a batch" if in_batch else "in-batch negatives off"
    raise ConfigError(
        f"data source '{dataset.name}' has {why} and no document of relevance 0 that is drawn: objective "
        f"'{part.title}' has nothing to compare a positive with, its loss is always 0. Add negatives, "
        + (f"or {MORE_QUERIES[0].lower()}{MORE_QUERIES[1:]}" if in_batch else "or set in_batch_negatives: true")
    )
