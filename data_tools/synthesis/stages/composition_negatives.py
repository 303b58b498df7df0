"""Hard negatives that a language model writes: a text with one thing changed, so that it is wrong.

    object      a brown dog   -> a brown cat
    attribute   a brown dog   -> a black dog
    relation    on the table  -> under the table
    count       two dogs      -> three dogs

After the abstract of DeGLA (arXiv 2504.16801), where a language model writes negative captions from examples; the four
kinds here and the prompt are ours. Each negative is a question of its own, so that one that fails costs no other, and
is checked: at least one word differs from the original, at most `most_changed` do (insertions, deletions and
replacements; characters in scripts without blanks), and no other document of the record reads the same. A model that
finds nothing of a kind to change answers "none". Objectives `negclip` and `degla` train on the records. `word_swaps`
needs no model. Cost: one short answer a positive and kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, reworded, text_of
from data_tools.synthesis.wording import unquoted
from mmembed.errors import ConfigError
from mmembed.registry import Positive

Change = Literal["object", "attribute", "relation", "count"]
NONE = "none"  # the answer where a text has nothing of a kind
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # scripts without blanks
_WORD = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+")
_VARIABLES = ("text", "change")


class CompositionNegatives(AskingStage):
    """Texts that differ from a positive in one thing, as hard negatives.

    Args:
        changes: what is changed, a negative of each.
        most_changed: words by which a negative may differ from the original.
        positives: of a record, whose negatives are written: the first ones.
        language: ISO 639-1 code that negatives have to be in; None checks nothing.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "composition_negatives"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        changes: Sequence[Change] = ("object", "attribute", "relation", "count"),
        most_changed: Positive = 4,
        positives: Positive = 1,
        language: str | None = None,
        max_tokens: Positive = 128,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if not changes or len(set(changes)) < len(changes):
            raise ConfigError(f"{self.name}.changes: found {list(changes)}; give at least one, each once")
        self.changes, self.most_changed, self.positives = tuple(changes), most_changed, positives
        self.language, self.max_tokens, self.temperature = language, max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        chosen = [
            (place, document)
            for place, document in enumerate(item["documents"])
            if document.get("relevance", 1.0) > 0 and text_of(document["content"]).strip()
        ][: self.positives]
        wanted = [(place, document, change) for place, document in chosen for change in self.changes]
        asks = [self._ask(place, text_of(document["content"]), change) for place, document, change in wanted]
        answers = (yield asks) if asks else []
        there = {_plain(text_of(one)) for one in (item["query"], *(one["content"] for one in item["documents"]))}
        made: list[Any] = []
        for (place, document, change), text in zip(wanted, answers, strict=True):
            if text is None or text == NONE or _plain(text) in there:
                context.notes[f"{'lost' if text is None else 'no negative'}: {change}"] += 1
                continue
            there.add(_plain(text))
            name = document.get("id") or f"{item['id']}-{place}"
            made.append(
                {
                    "content": reworded(document["content"], text),
                    "relevance": 0.0,
                    "id": f"{name}-other-{change}",
                    "meta": {"by": self.name, "changed": change},
                }
            )
        return [{**item, "documents": [*item["documents"], *made]}]

    def _ask(self, place: int, text: str, change: Change) -> Ask:
        return Ask(
            f"{place}-{change}",
            self.template.messages({"text": text, "change": change}),
            f"{text} {change}",
            partial(self._read, text),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            language=self.language,
            optional=True,
        )

    def _read(self, text: str, answer: str) -> str:
        changed = unquoted(answer)
        if changed.strip(".").lower() == NONE:
            return NONE
        count = changed_words(text, changed)
        if not count:
            raise Unusable("copies", changed[:100])
        if count > self.most_changed:
            raise Unusable("too many words changed", f"{count}: {changed[:100]}")
        return changed


def changed_words(first: str, second: str) -> int:
    """The edit distance of two texts in words, whatever their case and punctuation.

    >>> changed_words("A dog on the sofa.", "a cat under the old sofa")
    3
    """
    left, right = _WORD.findall(first.casefold()), _WORD.findall(second.casefold())
    row = list(range(len(right) + 1))
    for number, word in enumerate(left, start=1):
        before, row = row, [number]
        for place, other in enumerate(right):
            row.append(min(before[place] + (word != other), before[place + 1] + 1, row[place] + 1))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))
