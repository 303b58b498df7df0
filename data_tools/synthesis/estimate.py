"""What a run will ask, before it starts: its stages at work on a few items, with answers made up of the schemas.

Stages that ask get made-up answers of the longest length their questions allow, so answer tokens are an upper bound;
filters and selections keep everything, because what they will leave out depends on texts that are not written yet. So
the estimate is one of the most that the pipeline asks for when no answer is unusable. Tokens are counted as four
characters each, of pictures 256 each, since the generator is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.generators import parts_of
from data_tools.synthesis.inputs import collect, media_of
from data_tools.synthesis.settings import Step, SynthesisConfig, steps
from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Lost, Unusable
from mmembed.errors import MmembedError

SAMPLE = 32  # items that go through the stages
CHARACTERS = 4  # of a token
PICTURE_TOKENS = 256
_WORDS = "words that stand for an answer "


@dataclass
class Count:
    """Of one stage, of the whole run. tokens: of prompts, and at most of answers."""

    items: float = 0.0
    requests: float = 0.0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0


def estimate(config: SynthesisConfig, output: Path) -> str:
    """What would be asked, as lines; nothing is. Reads the sources."""
    work = output / "work"
    work.mkdir(exist_ok=True)
    media = media_of(config)
    inputs = collect(config, media, work)
    sample = list(islice(inputs.items, SAMPLE))
    whole, begun = float(len(inputs.items)), len(sample)
    lines, total = [f"read: {len(inputs.items):,} items; estimated from the first {len(sample)}"], Count()
    for step in steps(config):
        context = Context(config.seed, media, work / step.name, config.below_root)
        scale = whole / begun  # items of the run for one of the sample
        count, sample = _of_stage(step, sample, context, config, scale)
        what = f"{step.name}: {count.items:,.0f} items"
        if count.requests:
            what += f", {count.requests:,.0f} requests, {count.prompt_tokens:,.0f} tokens of prompts, "
            what += f"at most {count.answer_tokens:,.0f} of answers"
        lines.append(what)
        total.requests += count.requests
        total.prompt_tokens += count.prompt_tokens
        total.answer_tokens += count.answer_tokens
        if not sample:
            lines.append("nothing of the sample is left for the stages behind it; they are not estimated")
            break
    return "\n".join([*lines, *_summed(total, config)])


def _of_stage(
    step: Step, sample: list[Item], context: Context, config: SynthesisConfig, scale: float
) -> tuple[Count, list[Item]]:
    """The count of a stage, and the items that the sample becomes."""
    count, made = Count(items=len(sample) * scale), list[Item]()
    if not isinstance(step.stage, AskingStage):
        return count, sample
    for item in sample:
        try:
            made += _answered(step.stage, item, context, config, count, scale)
        except (Lost, MmembedError):
            continue
    return count, made


def _answered(
    stage: AskingStage, item: Item, context: Context, config: SynthesisConfig, count: Count, scale: float
) -> list[Item]:
    work = stage.work(item, context)
    try:
        asks = next(work)
        while True:
            for ask in asks:
                parts = parts_of(ask.messages)
                texts = sum(len(part["text"]) for part in parts if part["type"] == "text")
                pictures = sum(part["type"] == "image" for part in parts)
                count.requests += scale
                count.prompt_tokens += scale * (texts / CHARACTERS + pictures * PICTURE_TOKENS)
                count.answer_tokens += scale * (ask.max_tokens or config.sampling.max_tokens)
            asks = work.send([_made_up(ask) for ask in asks])
    except StopIteration as end:
        return list(end.value)


def _made_up(ask: Ask) -> Any:
    value = _WORDS * 4 if ask.schema is None else _of_schema(ask.schema)
    try:
        return ask.read(value)
    except Unusable:
        return value


def _of_schema(schema: Mapping[str, Any]) -> Any:
    """A value that satisfies a schema, as far as stages use schemas."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {key: _of_schema(one) for key, one in schema.get("properties", {}).items()}
    if kind == "array":
        return [_of_schema(schema.get("items", {})) for _ in range(max(1, schema.get("minItems", 1)))]
    if kind in ("integer", "number"):
        return schema.get("minimum", 0)
    if kind == "boolean":
        return True
    text = _WORDS * (1 + schema.get("minLength", 0) // len(_WORDS))
    return text[: schema.get("maxLength", len(text))]


def _summed(total: Count, config: SynthesisConfig) -> list[str]:
    tokens = f"{total.prompt_tokens:,.0f} tokens of prompts, at most {total.answer_tokens:,.0f} of answers"
    lines = [f"in all: {total.requests:,.0f} requests, {tokens}"]
    prices = config.prices
    if prices.prompt or prices.answer:
        cost = (total.prompt_tokens * prices.prompt + total.answer_tokens * prices.answer) / 1e6
        lines.append(f"cost: at most {cost:,.2f} (prices of the config, a million tokens)")
    if prices.tokens_per_second is not None:
        lines.append(f"time: at most {total.answer_tokens / prices.tokens_per_second / 3600:,.2f} hours")
    budget = config.budget
    for name, found, most in (
        ("requests", total.requests, budget.requests),
        ("tokens", total.prompt_tokens + total.answer_tokens, budget.tokens),
    ):
        if most is not None and found > most:
            lines.append(f"budget.{name} {most:,} is below that: the run would stop asking there")
    return lines
