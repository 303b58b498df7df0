"""The data of `train_generative_reranker`: sources -> conversations -> the table that trl reads; what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.config.generative import GenerativeConfig
from mmembed.content import Image
from mmembed.data.dataset import RecordDataset, media_store
from mmembed.errors import ConfigError
from mmembed.generation.conversations import Conversations, converse
from mmembed.generation.prompts import Writer, answered
from mmembed.media import MediaStore
from mmembed.models.generator import Generator
from mmembed.preprocess import template_options


def conversations_of(config: GenerativeConfig, writer: Writer, seed: int) -> tuple[list[Conversations], MediaStore]:
    """Of each source, and what opens their pictures. Raises as `RecordDataset` and `converse`."""
    data = config.data
    keys = ("path", "format", "options", "name", "instruction", "max_examples")
    sources = tuple(SourceConfig(**{key: vars(source)[key] for key in keys}) for source in data.train)
    media = media_store(
        DataConfig(root=data.root, media_root=data.media_root, media_limits=data.media_limits, train=sources)
    )
    made = [
        converse(RecordDataset(source, media, data.on_bad_record, root=data.root), config, writer, seed)
        for source in sources
    ]
    if not writer.family.multimodal and any(one.prompt.images for source in made for one in source.found):
        raise ConfigError("data.train: there are pictures, and this backbone reads text only")
    return made, media


def report(made: Sequence[Conversations], config: GenerativeConfig) -> str:
    """What a run is about to train on, and what was left out or cut."""
    what = "reasons and judgements" if config.answer.type == "rationale" else "orders"
    what = f"pairs of {what}" if config.method.type == "dpo" else what
    lines = ["sources:"]
    for source in made:
        lines.append(f"  {source.name}: {source.records:,} records, {len(source.found):,} {what}")
        for reason, count in source.idle.items():
            lines.append(f"    warning: {count:,} records, the first at {source.first_idle}, {reason}")
        cuts = source.cuts
        if cuts:
            lost = 1 - sum(cut.kept for cut in cuts) / sum(cut.tokens for cut in cuts)
            longest = max(cut.tokens for cut in cuts)
            lines.append(
                f"    {len(cuts):,} texts are cut to fit `lengths`: the last {lost:.0%} of their tokens on average; "
                f"the longest has {longest:,}"
            )
    first = made[0].found[0]
    lines += [f"first answer ('{made[0].name}'): {first.answer}"]
    lines += [f"  not: {first.rejected}"] if first.rejected is not None else []
    return "\n".join(lines)


def table(made: Sequence[Conversations], generator: Generator, media: MediaStore) -> Any:
    """A `datasets.Dataset` of trl's columns: prompt and completion, or prompt, chosen and rejected; pictures are opened
    when a row is read."""
    from datasets import Dataset

    family, found = generator.family, [one for source in made for one in source.found]
    pictured = any(one.prompt.images for one in found)
    options = template_options(generator.processor)
    rows = []
    for one in found:
        row: dict[str, Any] = {"prompt": one.prompt.messages}
        right = answered(one.answer, family)
        if one.rejected is None:
            row["completion"] = right
        else:
            row |= {"chosen": right, "rejected": answered(one.rejected, family)}
        if options:
            row["chat_template_kwargs"] = options
        if pictured:
            row["images"] = [str(image.source) for image in one.prompt.images]
        rows.append(row)
    dataset = Dataset.from_list(rows)
    if not pictured:
        return dataset

    def opened(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pictures = [[media.open(Image(source)) for source in sources] for sources in batch["images"]]
        return {name: pictures if name == "images" else [_plain(one) for one in batch[name]] for name in batch}

    return dataset.with_transform(opened)


def _plain(messages: Any) -> Any:
    """Messages without the keys that the table filled with None: a picture has no text."""
    if isinstance(messages, list):
        return [_plain(one) for one in messages]
    if isinstance(messages, dict):
        return {key: _plain(value) for key, value in messages.items() if value is not None}
    return messages
