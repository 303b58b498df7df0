"""What a run is about to do, said before step 1: sources, negatives, tokens, memory, fields that would go unused.

Most failed trainings were visible in their first batch: hard negatives that never arrive, accumulation taken for a
larger contrastive batch, in-batch negatives on for classification. Costs one batch of preprocessing, no model run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmembed.backbones.output_embedding import OutputEmbedding
from mmembed.config.blocks import EmbedderConfig
from mmembed.content import Task, Text
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.collate import Batch
from mmembed.data.records import STS_POSITIVE
from mmembed.data.streaming import RecordStream, Source
from mmembed.errors import ConfigError
from mmembed.objectives import Objective
from mmembed.objectives.relations import Relations
from mmembed.preprocess import Preprocessor, Row
from mmembed.prompts import PROMPTS, PromptStyle, Rendered
from mmembed.training.batches import sources_apart
from mmembed.training.gradcache import whole_parts
from mmembed.training.memory import gradient_bytes, optimizer_bytes, trained_parameters
from mmembed.training.supply import check_supply, named_parts, shortages

APART = "the pairs differ by dropout, each input has masks of its own"
WIDE = 2**26  # bytes of known positives of a batch that are worth a word
LABELLED_TASKS = (Task.CLASSIFICATION, Task.CLUSTERING)


@dataclass(frozen=True)
class Report:
    """Lines to print and warnings to log."""

    lines: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"warning: {warning}" for warning in self.warnings)])


def check_sources(
    datasets: Sequence[Source],
    config: EmbedderConfig,
    objective: Objective,
    reads: Collection[str] = ("image", "video"),
    processes: int = 1,
) -> None:
    """What can be told before weights are loaded: whether each source has something to compare, and whether the run
    would use every field that it carries and `data.ignore_fields` does not name.

    Args:
        reads: the media that the backbone reads (`mmembed.models.continuing.reads_media`).
        processes: that train together.

    Raises:
        ConfigError: a source does not suit its objective (`Objective.check`), holds nothing of what it compares
            (`check_supply`), has STS pairs of middling similarity, or carries what the objective, the size of the
            groups, the prompt or the backbone leaves unused.
    """
    objective.check(datasets)
    unwritten = _unwritten(PROMPTS.build(config.prompt), reads)
    for dataset in datasets:
        part = objective.part_for(dataset.name, min(dataset.tasks))
        check_supply(dataset, config, part, processes)
        count, where = dataset.untrainable
        if count and not part.pairs:
            raise ConfigError(
                f"data source '{dataset.name}': {count:,} STS records, the first at {where}, have a relevance below "
                f"{STS_POSITIVE}: neither positives nor negatives of contrastive training. Leave them out: format "
                "pairs has options: {at_least: ...}, from another file remove them. Or train on all of them with an "
                "objective for graded pairs: pearson, rank_kl, pro"
            )
        _refuse(dataset, config, _unread(config, part) | unwritten)


def batch_report(
    config: EmbedderConfig,
    datasets: Sequence[Source],
    plan: BatchPlan,
    first: Batch,
    model: nn.Module,
    objective: Objective,
    preprocessor: Preprocessor,
    accumulation: int,
    unshared: str | None = None,
    lockstep: bool = False,
    features: str = "",
    optimizer: str = "adamw",
) -> Report:
    """Describes the run.

    Args:
        first: this process's first batch.
        accumulation: gradient accumulation steps, which enlarge no contrastive batch.
        unshared: why no prefixes are shared, where that is so for the whole run.
        lockstep: all processes run as many chunks, and only the last one's graph is kept (DeepSpeed, FSDP2).
        features: what becomes of the features of images, a line; none where it is empty.
        optimizer: of `optimizer_name`.
    """
    lines = ["sources:"]
    warnings = []
    for dataset, batches, rows in zip(datasets, plan.batches_per_source, plan.batch_sizes, strict=True):
        source, part = dataset.source, objective.part_for(dataset.name, min(dataset.tasks))
        tasks = ", ".join(sorted(task.value for task in dataset.tasks))
        each = f" of {rows} queries" if len(set(plan.batch_sizes)) > 1 else ""
        kind = "graded pairs" if part.pairs else f"in-batch negatives {'on' if source.in_batch_negatives else 'off'}"
        kind = "each query with its own documents" if part.judges else kind
        lines.append(
            f"  {dataset.name}: {_extent(dataset)} ({tasks}), {batches:,} of {len(plan):,} batches an "
            f"epoch{each}, {kind}"
        )
        if dataset.maker is not None:
            lines.append(f"    pairs by {dataset.maker.name}, drawn anew from a document at each visit")
        if dataset.skipped:
            lines.append(f"    skipped {sum(dataset.skipped.values()):,} bad records: {dict(dataset.skipped)}")
        warnings += shortages(dataset, config, part)
        if source.in_batch_negatives and dataset.tasks & set(LABELLED_TASKS) and "labels" not in part.reads:
            warnings.append(
                f"data source '{dataset.name}' ({tasks}) has in-batch negatives on: texts of one class are false "
                "negatives of each other; set in_batch_negatives: false (NV-Embed, section 3)"
            )
    lines += _batch_lines(config, plan, first, objective, preprocessor, accumulation, lockstep)
    _, _, emptied = count_cut([first])
    warnings += prompt_alone(emptied, config) + many_positives(first, plan.world_size)
    apart = first.labels.source in sources_apart(datasets)
    lines.append("  " + _sharing(first, unshared or (APART if apart else None)))
    predicts = objective.part_for(first.labels.source, first.labels.task).predicts
    if predicts:
        count = count_predicted(first)
        read = [buffer for part in model.modules() if isinstance(part, OutputEmbedding) for buffer in part.buffers()]
        size = sum(buffer.numel() * buffer.element_size() for buffer in read) / 2**20
        beside = f", by an output embedding of {size:,.0f} MB beside the weights" if read else ""
        lines.append(f"  captioning: {count:,} of {first.tokens:,} tokens are predicted{beside}")
        if not count:
            warnings.append(
                f"the first batch ('{first.labels.source}') has no text of the role {' or '.join(sorted(predicts))} to "
                "predict: set the sides of the objective 'captioning' to where the texts are"
            )
    lines += [features] if features and preprocessor.family.multimodal else []
    trained = trained_parameters(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines.append(f"parameters: {sum(parameter.numel() for parameter, _ in trained):,} trained of {total:,}")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = (weights, gradient_bytes(trained), optimizer_bytes(optimizer, trained)[0])
    weights_mb, gradients_mb, state_mb = (f"{count / 2**20:,.0f} MB" for count in held)
    lines.append(
        f"memory: weights {weights_mb}, gradients {gradients_mb}, state of {optimizer} {state_mb}, and the activations "
        "of training.token_budget tokens"
    )
    return Report(tuple(lines), tuple(warnings))


def keep_tokens(config: EmbedderConfig) -> int | None:
    """Padded tokens whose graphs may stay alive between the passes; None is all."""
    if config.training.grad_cache == "auto":
        return config.training.token_budget
    return 0 if config.training.grad_cache else None


def count_negatives(batch: Batch, objective: Objective, world_size: int) -> tuple[float, float, float]:
    """Of a query, on average: its own hard negatives, in-batch negatives of its process, and of all others, at most.

    Duplicates and known positives do not count where the objective masks them; those of other processes are not known.
    """
    labels = batch.labels
    part = objective.part_for(labels.source, labels.task)
    if part.pairs:
        return 0.0, 0.0, 0.0
    masks = any(one.contrasts for one in named_parts(part))
    relevance, valid = Relations.gather(labels, across=False).matrix(slice(None), slice(None), masks)  # (Q, D) each
    negative = valid & (relevance <= 0)
    of_query = labels.owner[None, :] == torch.arange(batch.n_queries)[:, None]  # (Q, D)
    own, others = (int((negative & cells).sum()) / batch.n_queries for cells in (of_query, ~of_query))
    remote = (world_size - 1) * batch.n_documents if labels.in_batch and part.across_processes else 0.0
    return own, others, remote


def count_visual(rows: Sequence[Row], preprocessor: Preprocessor) -> int:
    """Tokens that stand for pieces of pictures."""
    family = preprocessor.family
    if not family.multimodal:
        return 0
    image_token = family.tokenizer.convert_tokens_to_ids(family.image_token)
    return sum(token == image_token for row in rows if row.images for token in row.ids)


def count_cut(batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Of all inputs: their number, those that a length limit cut, and those of whose texts it left nothing."""
    cuts = _cuts(batches)
    return len(cuts), sum(cut > 0 for cut in cuts), sum(cut == 1 for cut in cuts)


def lost(batches: Sequence[Batch]) -> float:
    """Of inputs that are cut: the share of their text tokens that is gone, on average; of a pair its document's."""
    cuts = [cut for cut in _cuts(batches) if cut > 0]
    return sum(cuts) / len(cuts) if cuts else 0.0


def _cuts(batches: Sequence[Batch]) -> list[float]:
    return [row.cut for batch in batches for chunk in batch.chunks for row in chunk.rows]


def cut_line(inputs: int, cut: int, share: float, config: EmbedderConfig) -> list[str]:
    """What `lengths` cut, in a line; none where nothing is."""
    if not cut:
        return []
    what, whose = ("inputs", "texts") if config.head is None else ("pairs", "documents")
    return [
        f"{cut / inputs:.1%} of the {what} ({cut:,} of {inputs:,}) are cut to fit `lengths`: the last {share:.0%} of "
        f"their {whose} on average"
    ]


def prompt_alone(emptied: int, config: EmbedderConfig) -> list[str]:
    """A warning where the prompts of inputs fill their limits."""
    if not emptied:
        return []
    lengths = config.lengths
    if config.head is not None:
        return [
            f"nothing is left of {emptied:,} documents: instruction and query fill the pair's limit, "
            f"lengths.query_max_length + document_max_length ({lengths.query_max_length} + "
            f"{lengths.document_max_length}); raise one of them, or shorten the instruction"
        ]
    return [
        f"the prompt alone fills the limit of {emptied:,} inputs: nothing is left of their texts; raise "
        f"lengths.query_max_length ({lengths.query_max_length}) or document_max_length "
        f"({lengths.document_max_length}), or shorten the instruction"
    ]


def many_positives(batch: Batch, processes: int) -> list[str]:
    """A warning where one query has so many positives that telling them from in-batch negatives takes much memory."""
    queries, positives, _ = batch.labels.positive_keys.shape
    size = batch.labels.positive_keys.nbytes * processes
    if size < WIDE:
        return []
    return [
        f"a query of the first batch ('{batch.labels.source}') has {positives:,} positives: to mask them among the "
        f"in-batch negatives each process holds as many for each of {queries * processes:,} queries, "
        f"{size / 2**20:,.0f} MB a few times; divide such records, or lower training.per_device_train_batch_size"
    ]


def count_predicted(batch: Batch) -> int:
    """Tokens that a language-model loss predicts; none is in front of the first of an input."""
    rows = [row for chunk in batch.chunks for row in chunk.rows]
    return sum(stop - max(first, 1) for row in rows for first, stop in row.predicted or () if stop > 1)


def _batch_lines(
    config: EmbedderConfig,
    plan: BatchPlan,
    first: Batch,
    objective: Objective,
    preprocessor: Preprocessor,
    accumulation: int,
    lockstep: bool = False,
) -> list[str]:
    labels = first.labels
    own, others, remote = count_negatives(first, objective, plan.world_size)
    sizes = " or ".join(map(str, sorted(set(plan.batch_sizes))))
    if objective.part_for(labels.source, labels.task).pairs:
        compared = f"{first.n_documents} graded pairs, compared within this process"
    else:
        compared = (
            f"{own:.1f} hard negatives a query, {others:.1f} in-batch negatives of this process (without duplicates "
            f"and known positives) and {remote:.0f} of others at most"
        )
    inputs = sum(len(chunk.rows) for chunk in first.chunks)
    pictured = [row for chunk in first.chunks for row in chunk.rows if row.images]
    visual = count_visual(pictured, preprocessor)
    kept = keep_tokens(config)
    if lockstep and kept != 0:
        kept = first.chunks[-1].padded_tokens
    again = max(0, first.padded_tokens - kept) if kept is not None else 0
    if not lockstep and objective.part_for(labels.source, labels.task).separable:
        _, left, kept_from = whole_parts(first, kept)
        again = sum(first.chunks[number].padded_tokens for number in left[:kept_from])
    lines = [
        f"batch: {sizes} queries x {plan.world_size} processes of one source",
        f"first batch ('{labels.source}'): {compared}",
        f"  {inputs:,} distinct inputs ({len(pictured):,} with images), {first.tokens:,} tokens ({visual:,} visual), "
        f"{first.padded_tokens / (first.tokens - first.saved_tokens) - 1:.0%} padding, {len(first.chunks)} chunks, "
        f"{again / first.padded_tokens:.0%} encoded twice",
    ]
    every, cut, _ = count_cut([first])
    lines += [f"  {line}" for line in cut_line(every, cut, lost([first]), config)]
    if accumulation > 1:
        lines.append(f"  {accumulation} accumulated batches a step: they average gradients, negatives do not add up")
    return lines


def _sharing(first: Batch, unshared: str | None) -> str:
    """How much of a batch is shared prefixes, or why nothing is."""
    if unshared is not None:
        return f"shared prefixes: none ({unshared})"
    if not first.saved_tokens:
        return "shared prefixes: none (no beginning that enough inputs have in common)"
    sharing = [chunk for chunk in first.chunks if chunk.shared]
    inputs = sum(len(chunk.rows) for chunk in sharing)
    return (
        f"shared prefixes: {inputs:,} inputs in {len(sharing)} chunks begin alike; {first.saved_tokens:,} tokens "
        f"({first.saved_tokens / first.tokens:.0%}) are not computed again"
    )


def _extent(dataset: Source) -> str:
    if isinstance(dataset, RecordStream):
        return f"a stream of {len(dataset.shards):,} files"
    return f"{len(dataset):,} {'records' if dataset.maker is None else 'documents'}"


def _refuse(dataset: Source, config: EmbedderConfig, unused: dict[str, str]) -> None:
    for field, reason in unused.items():
        if field in dataset.fields and field not in config.data.ignore_fields:
            raise ConfigError(
                f"data source '{dataset.name}' carries '{field}', which {reason}. To train without it set "
                f"data.ignore_fields: [{field}]"
            )


def _unread(config: EmbedderConfig, objective: Objective) -> dict[str, str]:
    """Field -> why groups and objective do not use it."""
    unused = {
        "rationale": "recipes/train_generative_reranker.py trains on, and this run does not",
    }
    if config.data.positives_per_query == 1:  # a loss weighs the positives of a query against each other
        unused["relevance"] = (
            "(grades other than 0 and 1) has no effect with one positive a query, drawn whatever its grade: set "
            "data.positives_per_query to 2 or more"
        )
    for field in ("score", "relevance", "labels"):
        if field not in objective.reads:
            unused[field] = "the objective's loss does not read"
    if config.data.train_group_size == config.data.positives_per_query:
        unused["negatives"] = "data.train_group_size leaves no room for"
    elif not objective.takes_negatives:
        unused["negatives"] = f"objective '{objective.title}' compares no query with"
    return unused


def _unwritten(prompt: PromptStyle, reads: Collection[str]) -> dict[str, str]:
    """Field -> why prompt and backbone do not use it."""
    unused = {}
    probe = (Text("content"),)
    given: list[Rendered] = [
        prompt.render_pair(probe, probe, told) if prompt.reads_pairs else prompt.render(probe, "query", told)
        for told in ("instruction", None)
    ]
    if given[0] == given[1]:
        unused["instruction"] = "the prompt style does not write"
    seen = {"image": "this text backbone cannot read", "video": "this text backbone cannot read"}
    unread = seen | {"audio": "this backbone cannot hear (docs/guide/audio.md names those that do)"}
    return unused | {medium: why for medium, why in unread.items() if medium not in reads}
