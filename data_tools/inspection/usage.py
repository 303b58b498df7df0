"""What a training run would do with its sources: refuse them, leave fields unused, and how much a query meets.

The checks are those of the run itself (`mmembed.training`), asked one by one so that all answers are given and not the
first only. Positives and negatives are counted in the run's own batches, of one process, drawn and tokenized as it
would; weights are not loaded. The records of a source are cached as the run caches them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

from mmembed.config.blocks import EmbedderConfig
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.dataset import MixedDataset, media_store
from mmembed.data.streaming import RecordStream, Source, open_source
from mmembed.errors import ConfigError, MmembedError
from mmembed.models.continuing import inherit_settings, reads_media
from mmembed.objectives import Objective
from mmembed.plan import OF_THE_DEVICE
from mmembed.training.arguments import training_arguments
from mmembed.training.batch_report import check_sources, count_negatives
from mmembed.training.batches import (
    build_collator,
    chunk_tokens,
    data_seed,
    graded_sources,
    plan_batches,
    sources_apart,
    sources_of_positives,
)
from mmembed.training.estimate import outline, with_training
from mmembed.training.preflight import preflight
from mmembed.training.supply import shortages

BATCHES = 8  # of a source that are drawn


@dataclasses.dataclass
class Usage:
    """What becomes of one source.

    refused: why the run would not start. unused: field -> why nothing reads it. ignored: fields that may go unused,
    because `data.ignore_fields` names them. positives, own_negatives, in_batch_negatives: of a query, on average;
    None where the source is refused.
    """

    objective: str
    records: int | None
    skipped: dict[str, int]
    used: list[str]
    refused: list[str]
    unused: dict[str, str]
    ignored: list[str]
    warnings: list[str]
    batches: int = 0
    queries_a_batch: int = 0
    positives: float | None = None
    own_negatives: float | None = None
    in_batch_negatives: float | None = None


def usage_of(config: EmbedderConfig) -> dict[str, Usage | str]:
    """By name of the source; a text where it cannot be read at all.

    Raises:
        ConfigError: the config describes no run, whatever its data.
    """
    config = inherit_settings(_skipping(config))
    objective = preflight(config)
    media, reads = media_store(config.data), reads_media(config)
    seed = data_seed(training_arguments(with_training(config, without=OF_THE_DEVICE)))
    opened: dict[str, Source] = {}
    found: dict[str, Usage | str] = {}
    for source in config.data.train:
        try:
            opened[source.name] = open_source(source, config.data, media, seed, objective.title)
        except MmembedError as error:
            found[source.name] = str(error)
            continue
        found[source.name] = _judged(opened[source.name], config, objective, reads)
    try:
        objective.check(list(opened.values()))
    except ConfigError as error:
        for usage in found.values():
            if isinstance(usage, Usage) and not usage.refused:
                usage.refused.append(str(error))
    taken = [name for name, usage in found.items() if isinstance(usage, Usage) and not usage.refused]
    if taken:
        _count(config, objective, [opened[name] for name in taken], found)
    return found


def _skipping(config: EmbedderConfig) -> EmbedderConfig:
    """Bad records are counted, not raised."""
    return config.model_copy(update={"data": config.data.model_copy(update={"on_bad_record": "skip"})})


def _judged(source: Source, config: EmbedderConfig, objective: Objective, reads: Collection[str]) -> Usage:
    """What the checks say of a source, without its batches."""
    try:
        part = objective.part_for(source.name, min(source.tasks))
    except ConfigError as error:
        return Usage("none", source.size, dict(source.skipped), [], [str(error)], {}, [], [])
    refused = _refusal(source, config, part, reads, source.fields)
    unused, given = {}, set(config.data.ignore_fields)
    for field in sorted(source.fields):
        reason = _refusal(source, config, part, reads, source.fields - {field})
        if refused is None and reason is not None:
            unused[field] = reason.split(f"carries '{field}', which ")[-1].split(". To train without it")[0]
    problems = [] if refused is None else [refused]
    problems += [f"carries '{field}', which {why}" for field, why in unused.items() if field not in given]
    return Usage(
        objective=part.title,
        records=source.size,
        skipped=dict(source.skipped),
        used=sorted(source.fields - unused.keys()),
        refused=problems,
        unused=unused,
        ignored=sorted(given & source.fields),
        warnings=shortages(source, config, part),
    )


def _refusal(
    source: Source, config: EmbedderConfig, part: Objective, reads: Collection[str], ignored: set[str]
) -> str | None:
    """Why a run that may ignore some fields refuses a source; None: it does not."""
    data = config.data.model_copy(update={"ignore_fields": tuple(sorted(ignored))})
    try:
        check_sources([source], config.model_copy(update={"data": data}), part, reads)
    except ConfigError as error:
        return str(error)
    return None


def _count(
    config: EmbedderConfig, objective: Objective, sources: Sequence[Source], found: dict[str, Usage | str]
) -> None:
    """Draws batches of the sources that the run would take, and fills in what a query meets in them."""
    names = [source.name for source in sources]
    train = tuple(source for source in config.data.train if source.name in names)
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": train})})
    args = training_arguments(with_training(config, without=OF_THE_DEVICE))
    try:
        plan = plan_batches(config, sources, args, 1)
    except ConfigError as error:
        for name in names:
            usage = found[name]
            assert isinstance(usage, Usage)
            usage.refused.append(str(error))
        return
    _, preprocessor = outline(config, media_store(config.data))
    collator = build_collator(
        config, preprocessor, args, chunk_tokens(config), share_prefix=False, packed=False,
        graded=graded_sources(sources, objective), apart=sources_apart(sources),
        positives_only=sources_of_positives(sources, objective),
    )  # fmt: skip
    mixed = MixedDataset(sources, data_seed(args))
    for place, name in enumerate(names):
        usage = found[name]
        assert isinstance(usage, Usage)
        batches = [collator([mixed[draw] for draw in draws]) for draws in _drawn(plan, place, sources)]
        counts = [count_negatives(batch, objective, 1) for batch in batches]
        queries = sum(batch.n_queries for batch in batches)
        usage.batches, usage.queries_a_batch = len(batches), round(queries / max(1, len(batches)))
        positives = sum(int((batch.labels.relevance > 0).sum()) for batch in batches)
        usage.positives = round(positives / queries, 3)
        usage.own_negatives, usage.in_batch_negatives = (
            round(sum(one[at] for one in counts) / len(counts), 3) for at in (0, 1)
        )


def _drawn(plan: BatchPlan, place: int, sources: Sequence[Source]) -> list[list[Any]]:
    """The first batches of an epoch that are of the source; of a stream fewer, for each reads up to it."""
    count = 1 if any(isinstance(source, RecordStream) for source in sources) else BATCHES
    return list(islice((draws for draws in plan if draws[0][0] == place), count))
