"""What a run will ask, before it starts: its stages at work on a few items, with the sample answers of their questions.

Filters and selections keep everything, because what they will leave out depends on texts that are not written yet; no
answer is unusable. Tokens are counted as four characters each, of pictures 256 each, since the generator is not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_tools.generators import parts_of
from data_tools.synthesis.inputs import collect, media_of
from data_tools.synthesis.settings import Step, SynthesisConfig, steps
from data_tools.synthesis.stages import AskingStage, Context, Dropped, Item, SetStage
from data_tools.synthesis.templates import as_answer

SAMPLE = 32  # items that go through the stages
CHARACTERS = 4  # of a token
PICTURE_TOKENS = 256


@dataclass
class Count:
    """Of one stage, of the whole run. most_tokens: of answers, where each goes on to its limit."""

    items: float = 0.0
    requests: float = 0.0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    most_tokens: float = 0.0


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
        context = Context(config.seed, media, work / step.title, config.below_root, step.title)
        scale = whole / begun  # items of the run for one of the sample
        count, sample = _of_stage(step, sample, context, config, scale)
        what = f"{step.name}: {count.items:,.0f} items"
        if count.requests:
            what += f", {_asked(count)}"
        lines.append(what)
        total.requests += count.requests
        total.prompt_tokens += count.prompt_tokens
        total.answer_tokens += count.answer_tokens
        total.most_tokens += count.most_tokens
        if not sample:
            lines.append("nothing of the sample is left for the stages behind it; they are not estimated")
            break
    return "\n".join([*lines, *_summed(total, config)])


def _of_stage(
    step: Step, sample: list[Item], context: Context, config: SynthesisConfig, scale: float
) -> tuple[Count, list[Item]]:
    """The count of a stage, and the items that the sample becomes."""
    count, made = Count(items=len(sample) * scale), list[Item]()
    if isinstance(step.stage, SetStage):
        return count, [step.stage.sampled(item, context) for item in sample]
    assert isinstance(step.stage, AskingStage)
    for item in sample:
        made += _answered(step.stage, item, context, config, count, scale)
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
                count.answer_tokens += scale * len(as_answer(ask.sample)) / CHARACTERS
                count.most_tokens += scale * (ask.max_tokens or config.sampling.max_tokens)
            asks = work.send([ask.read(ask.sample) for ask in asks])
    except StopIteration as end:
        return [] if isinstance(end.value, Dropped) else list(end.value)


def _asked(count: Count) -> str:
    answers = f"{count.answer_tokens:,.0f} of answers (at most {count.most_tokens:,.0f})"
    return f"{count.requests:,.0f} requests, {count.prompt_tokens:,.0f} tokens of prompts, {answers}"


def _summed(total: Count, config: SynthesisConfig) -> list[str]:
    lines = [f"in all: about {_asked(total)}"]
    prices, answers = config.prices, (total.answer_tokens, total.most_tokens)
    if prices.prompt or prices.answer:
        of_prompts = total.prompt_tokens * prices.prompt
        cost, most = (
            (of_prompts + tokens * prices.answer) / 1e6 for tokens in (total.answer_tokens, total.most_tokens)
        )
        lines.append(f"cost: about {cost:,.2f}, at most {most:,.2f} (by `prices` of the config)")
    if prices.tokens_per_second is not None:
        hours, longest = (tokens / prices.tokens_per_second / 3600 for tokens in answers)
        lines.append(f"time: about {hours:,.2f} hours, at most {longest:,.2f}")
    budget = config.budget
    for name, found, allowed in (
        ("requests", total.requests, budget.requests),
        ("tokens", total.prompt_tokens + total.answer_tokens, budget.tokens),
    ):
        if allowed is not None and found > allowed:
            lines.append(f"budget.{name} {allowed:,} is below that: the run would stop asking there")
    return lines
