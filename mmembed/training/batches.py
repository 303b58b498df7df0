"""Which batches a run draws, and how they are cut into chunks: one answer for the run and for its plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from transformers import TrainingArguments

from mmembed.config.blocks import EmbedderConfig
from mmembed.content import Role
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.collate import Collator
from mmembed.data.mixing import new_share, shares
from mmembed.data.streaming import RecordStream, Source
from mmembed.objectives import Objective
from mmembed.preprocess import Preprocessor

CHUNKS_A_BUDGET = 4  # finer chunks have less padding but smaller products (docs/log.md, chunk size)


def data_seed(args: TrainingArguments) -> int:
    """What batches and negatives are drawn by."""
    return args.seed if args.data_seed is None else args.data_seed


def plan_batches(
    config: EmbedderConfig,
    data: Sequence[Source],
    args: TrainingArguments,
    world_size: int,
    rank: int = 0,
    groups: Sequence[np.ndarray | None] | None = None,
) -> BatchPlan:
    """The batches of process `rank` of `world_size`. Streams learn how many records they have to give at least.

    Args:
        data: of the sources of config.data.train, in that order.
        groups: of each, the rows that stay together (`mmembed.training.batch_order`).

    Raises:
        ConfigError: a source is smaller than one global batch.
    """
    sizes = [source.size for source in data]
    streams = {number: source for number, source in enumerate(data) if isinstance(source, RecordStream)}
    batch_sizes = [source.batch_size or args.per_device_train_batch_size for source in config.data.train]
    rows = [size * world_size for size in batch_sizes]
    replay = [source.replay for source in config.data.train]
    batches = args.max_steps * args.gradient_accumulation_steps if streams else None
    if batches is None and any(replay):  # as many as show the new sources whole
        whole = [
            size // count
            for size, count, share in zip(sizes, rows, replay, strict=True)
            if share is None and size is not None
        ]
        batches = round(sum(whole) / new_share(replay))
    plan = BatchPlan(
        sizes,
        shares(
            config.data.mixing,
            sizes,
            rows,
            [source.weight for source in config.data.train],
            config.data.mixing_alpha,
            replay,
        ),
        batch_size=batch_sizes,
        seed=data_seed(args),
        world_size=world_size,
        rank=rank,
        keys=[source.keys() for source in data],
        names=[source.name for source in data],
        batches=batches,
        round_robin=config.data.mixing == "round_robin",
        clusters=groups,
    )
    for number, stream in streams.items():
        stream.least = plan.batch_rows(number)
    return plan


def graded_sources(data: Sequence[Source], objective: Objective) -> frozenset[str]:
    """Names of the sources whose objective takes graded pairs. Raises ConfigError where a source has no objective."""
    return frozenset(
        source.name for source in data if any(objective.part_for(source.name, task).pairs for task in source.tasks)
    )


def sources_apart(data: Sequence[Source]) -> frozenset[str]:
    """Names of the sources whose pairs differ by dropout, so that no prefix of them is shared."""
    return frozenset(source.name for source in data if source.maker is not None and source.maker.apart)


def sources_of_positives(data: Sequence[Source], objective: Objective) -> frozenset[str]:
    """Names of the sources whose objective takes no negatives. Raises ConfigError as `graded_sources`."""
    return frozenset(
        source.name
        for source in data
        if not any(objective.part_for(source.name, task).takes_negatives for task in source.tasks)
    )


def predicted_roles(data: Sequence[Source], objective: Objective) -> dict[str, frozenset[Role]]:
    """By source, the roles whose texts its objective predicts. Raises ConfigError as `graded_sources`."""
    return {
        source.name: frozenset().union(*(objective.part_for(source.name, task).predicts for task in source.tasks))
        for source in data
    }


def build_collator(
    config: EmbedderConfig,
    preprocessor: Preprocessor,
    args: TrainingArguments,
    chunk_tokens: int,
    share_prefix: bool,
    packed: bool,
    graded: Collection[str] = (),
    apart: Collection[str] = (),
    predicted: Mapping[str, Collection[Role]] | None = None,
    positives_only: Collection[str] = (),
) -> Collator:
    """What makes a batch of the drawn records; see `Collator`."""
    return Collator(
        preprocessor,
        {source.name: source for source in config.data.train},
        chunk_tokens=chunk_tokens,
        chunk_rows=config.training.chunk_rows,
        train_group_size=config.data.train_group_size,
        positives_per_query=config.data.positives_per_query,
        seed=data_seed(args),
        share_prefix=share_prefix,
        packed=packed,
        graded=graded,
        apart=apart,
        predicted=predicted,
        positives_only=positives_only,
        judges=config.head is not None,
    )


def chunk_tokens(config: EmbedderConfig) -> int:
    """Padded tokens a chunk: the budget itself where chunks are sized by rows or all recomputed, else a part of it."""
    training = config.training
    if training.chunk_rows is not None or training.grad_cache is True:
        return training.token_budget
    return max(training.token_budget // CHUNKS_A_BUDGET, min(longest_allowed(config), training.token_budget))


def longest_allowed(config: EmbedderConfig) -> int:
    """Text tokens of an input at most, by `lengths`; a reranker's pair has those of both sides."""
    limits = (config.lengths.query_max_length, config.lengths.document_max_length)
    return max(limits) if config.head is None else sum(limits)
