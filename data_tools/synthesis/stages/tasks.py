"""Invented tasks and examples of them, without any documents (E5-mistral, arXiv 2401.00368, section 3.1, appendix C).

Two steps, because one prompt for both gave less diverse data (section 3.1): a first ask brainstorms tasks of a kind, a
second one writes an example of each: a query, a document that fits, and one that seems to. The kinds are the paper's:

    short_long     a short query, long documents        long_short    classification: a text, its label, another label
    short_short    two short texts                      long_long     two long texts
    sts            three texts, similar and less so     bitext        a text, a translation, a flawed one

The last two need no brainstorm. What the examples vary in (kind of query, length, clarity, difficulty, scores, unit) is
drawn from the sets of tables 8 to 13. Departures: an item of the input, a topic or somebody who searches, seeds the
brainstorm, where the paper's prompts have none; short_short and long_long get a hard negative, too. The task is the
record's instruction; for sts and bitext it is a fixed one. Prompts are ours (templates/tasks.yaml, task_examples.yaml).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Lost, Unusable, Work
from data_tools.synthesis.templates import Template, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name
from mmembed.errors import ConfigError
from mmembed.registry import Positive

TaskKind = Literal["short_long", "long_short", "short_short", "long_long", "sts", "bitext"]
SYMMETRIC = {"sts": "Retrieve texts that mean the same.", "bitext": "Retrieve translations."}
_KEYS = ("query", "positive", "negative")
_CLARITY = ("clear", "understandable with some effort", "ambiguous")
_TEACHING = ("high school", "college", "PhD")
_SCHOOL = ("elementary school", "high school", "college")
_UNITS = ("sentence", "phrase", "passage")
_DRAWN: dict[str, dict[str, tuple[Any, ...]]] = {  # what examples of a kind vary in
    "short_long": {
        "query_type": ("extremely long-tail", "long-tail", "common"),
        "query_length": ("less than 5 words", "5 to 15 words", "at least 10 words"),
        "words": (50, 100, 200, 300, 400, 500), "clarity": _CLARITY, "difficulty": _TEACHING,
    },
    "long_short": {"words": (10, 50, 100, 200), "clarity": _CLARITY, "difficulty": _TEACHING},
    "short_short": {},
    "long_long": {"words": (300,)},
    "sts": {"unit": _UNITS, "high": (4, 4.5, 5), "low": (2.5, 3, 3.5), "difficulty": _SCHOOL},
    "bitext": {"unit": _UNITS, "high": (4, 4.5, 5), "low": (1.5, 2, 2.5), "difficulty": _SCHOOL},
}  # fmt: skip
_NAMES = ("query_type", "query_length", "clarity", "difficulty", "words", "unit", "high", "low")
_LONG = {"short_long": _KEYS[1:], "long_short": _KEYS[:1], "long_long": _KEYS}  # texts that have `words` words
_CHARACTERS = 8000  # of a text, at most


@dataclass(frozen=True)
class Plan:
    """An example to write. drawn: what it is to be like."""

    name: str
    kind: str
    task: str
    drawn: dict[str, Any]


class Tasks(AskingStage):
    """Records of invented tasks.

    Args:
        kinds: of tasks, each for every seed.
        tasks: brainstormed of a kind and seed.
        examples: of a task; of sts and bitext, which have one task, tasks x examples are written.
        languages: ISO 639-1 codes, of which one is drawn for each example, two for bitext. A code that stands there
            twice is drawn twice as often.
        temperature: the paper's is 1.
        template, example_template: YAML files in the place of the packaged ones.
    """

    name: ClassVar[str] = "tasks"
    takes: ClassVar[frozenset[Kind]] = frozenset({"queries"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        kinds: Sequence[TaskKind] = ("short_long", "long_short", "short_short", "long_long", "sts"),
        tasks: Positive = 5,
        examples: Positive = 1,
        languages: Sequence[str] = ("en",),
        max_tokens: Positive = 2048,
        temperature: float = 1.0,
        template: str | None = None,
        example_template: str | None = None,
    ) -> None:
        if not kinds or len(set(kinds)) < len(kinds):
            raise ConfigError(f"tasks.kinds: found {list(kinds)}; give different kinds, at least one")
        if not languages or ("bitext" in kinds and len(set(languages)) < 2):
            raise ConfigError(f"tasks.languages: found {list(languages)}; give one, and for bitext two")
        for code in languages:
            language_name(code)
        self.kinds, self.languages = tuple(kinds), tuple(languages)
        self.tasks, self.examples = tasks, examples
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, ("kind", "seed", "count"))
        variables = ("kind", "task", "seed", "language", "other_language", *_NAMES)
        self.example_template = Template("task_examples", example_template, below_root, variables)
        one = {"type": "string", "minLength": 10, "maxLength": 400}
        self.listed = _object({"tasks": {"type": "array", "items": one, "minItems": tasks, "maxItems": tasks}})
        text = {"type": "string", "minLength": 1, "maxLength": _CHARACTERS}
        self.written = _object(dict.fromkeys(_KEYS, text))

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return [self.template.source, self.example_template.source]

    def work(self, item: Item, context: Context) -> Work:
        seed = text_of(item["query"])
        tasks = yield from self._brainstorm(seed, context)
        plans = [
            Plan(f"{kind}-{number}", kind, of_kind[number // self.examples], self._drawn(kind, draw))
            for kind, of_kind in tasks.items()
            for draw in [context.random(item["id"], kind)]
            for number in range(len(of_kind) * self.examples)
        ]
        written = yield [self._example(plan, seed) for plan in plans]
        context.notes["examples that were lost"] += written.count(None)
        records = [self._record(item, plan, example) for plan, example in zip(plans, written, strict=True) if example]
        if not records:
            raise Lost("no example of any task")
        context.notes.update(f"records of {record['meta']['kind']}" for record in records)
        return records

    def _brainstorm(self, seed: str, context: Context) -> Generator[Sequence[Ask], list[Any], dict[str, list[str]]]:
        """Tasks of each kind, in a first turn; none of a kind whose ask was lost."""
        invented: list[str] = [kind for kind in self.kinds if kind not in SYMMETRIC]
        asks = [
            Ask(
                f"tasks-{kind}", self.template.messages({"kind": kind, "seed": seed, "count": self.tasks}),
                {"tasks": [filler(f"task-{number}-of-{kind}", 16) for number in range(self.tasks)]},
                _read_tasks, self.listed, self.max_tokens, self.temperature, optional=True,
            )
            for kind in invented
        ]  # fmt: skip
        found = (yield asks) if asks else []
        tasks = {kind: listed for kind, listed in zip(invented, found, strict=True) if listed is not None}
        context.notes["brainstorms that were lost"] += len(invented) - len(tasks)
        context.notes["tasks"] += sum(map(len, tasks.values()))
        fixed = {kind: [task] * self.tasks for kind, task in SYMMETRIC.items() if kind in self.kinds}
        return tasks | fixed

    def _drawn(self, kind: str, draw: random.Random) -> dict[str, Any]:
        """What an example is to be like, and its languages as codes."""
        language = draw.choice(self.languages)
        others = [code for code in self.languages if code != language]
        drawn = {name: draw.choice(_DRAWN[kind].get(name, ("",))) for name in _NAMES}
        return {**drawn, "language": language, "other_language": draw.choice(others) if kind == "bitext" else language}

    def _example(self, plan: Plan, seed: str) -> Ask:
        kind, drawn = plan.kind, plan.drawn
        spoken = {key: language_name(drawn[key]) for key in ("language", "other_language")}
        messages = self.example_template.messages({**drawn, **spoken, "kind": kind, "task": plan.task, "seed": seed})
        least = dict.fromkeys(_LONG[kind], drawn["words"] // 2) if kind in _LONG else {}
        sample = {key: filler(f"{key}-of-{plan.name}", 2 * least.get(key, 6)) for key in _KEYS}
        language = None if kind == "bitext" else drawn["language"]
        return Ask(
            plan.name, messages, sample, partial(_read_example, least), self.written, self.max_tokens, self.temperature,
            language, optional=True,
        )  # fmt: skip

    def _record(self, item: Item, plan: Plan, written: dict[str, str]) -> Item:
        name = f"{item['id']}-{plan.name}"
        drawn = {key: value for key, value in plan.drawn.items() if value != "" and key != "other_language"}
        if plan.kind == "bitext":
            drawn["other_language"] = plan.drawn["other_language"]
        told = {"source": item.get("source"), "task": "classification" if plan.kind == "long_short" else None}
        documents = [
            {"content": written[key], "relevance": relevance, "id": f"{name}-{key}", "meta": {"by": self.name}}
            for key, relevance in (("positive", 1.0), ("negative", 0.0))
        ]
        return {
            "id": name, "query": written["query"], "documents": documents, "instruction": plan.task,
            "meta": {"by": self.name, "kind": plan.kind, **drawn},
            **{key: value for key, value in told.items() if value},
        }  # fmt: skip


def _read_tasks(value: Any) -> list[str]:
    tasks = list(dict.fromkeys(" ".join(task.split()) for task in value["tasks"]))
    if any(not task for task in tasks):
        raise Unusable("an empty task")
    return tasks


def _read_example(least: dict[str, int], value: Any) -> dict[str, str]:
    texts = {key: value[key].strip() for key in _KEYS}
    for key, text in texts.items():
        check_words(text, max(1, least.get(key, 1)), _CHARACTERS)
    check_distinct(list(texts.values()))
    return texts


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
