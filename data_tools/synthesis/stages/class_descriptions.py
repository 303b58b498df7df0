"""Descriptions of classes, a first half of GIST, Generating Image-Specific Text (arXiv 2307.11315, after the abstract).

A document is a class: its id the label that records carry, its text the name. A language model that knows the domain
writes how members of the class look, once for each aspect; each description is a document of its own.
`match_descriptions` then finds for a picture those of its class that fit it, and `rewrite` with `styles: [summary]`
shortens them. The prompt is ours, with the domain as an option. Cost:
one answer a class and aspect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Work
from data_tools.synthesis.templates import Template, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name
from mmembed.errors import ConfigError
from mmembed.registry import Positive

_VARIABLES = ("name", "domain", "aspect", "count", "language")


class ClassDescriptions(AskingStage):
    """What members of a class look like, several times.

    Args:
        domain: what the classes are: "species of birds".
        aspects: what may differ within a class ("male birds", "young birds"), a question of each; without any, one.
        count: descriptions a question.
        max_words: of a description.
        language: ISO 639-1 code of what is written; None takes the model's.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "class_descriptions"
    takes: ClassVar[frozenset[Kind]] = frozenset({"documents"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        domain: str = "",
        aspects: Sequence[str] = (),
        count: Positive = 5,
        max_words: Positive = 80,
        language: str | None = None,
        max_tokens: Positive = 1024,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if len(set(aspects)) < len(aspects):
            raise ConfigError(f"{self.name}.aspects: found {list(aspects)}; give each once")
        self.domain, self.aspects, self.count, self.max_words = domain, tuple(aspects) or ("",), count, max_words
        self.least_words = min(3, max_words)
        self.language, self.in_words = language, language_name(language)
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)
        text = {"type": "string", "minLength": 1, "maxLength": 12 * max_words}
        listed = {"type": "array", "items": text, "minItems": count, "maxItems": count}
        self.schema = {
            "type": "object", "properties": {"descriptions": listed}, "required": ["descriptions"],
            "additionalProperties": False,
        }  # fmt: skip
        self.sample = {
            "descriptions": [filler(f"number {one}", max(self.least_words, max_words // 2)) for one in range(count)]
        }

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        name = text_of(item["content"]).strip()
        if not name:
            return Dropped(item, "no name")
        found = yield [
            Ask(
                f"aspect-{number}",
                self.template.messages(
                    {
                        "name": name, "domain": self.domain, "aspect": aspect, "count": self.count,
                        "language": self.in_words,
                    }
                ),
                self.sample, self._read, self.schema, self.max_tokens, self.temperature, self.language,
                optional=len(self.aspects) > 1,
            )
            for number, aspect in enumerate(self.aspects)
        ]  # fmt: skip
        texts = dict.fromkeys(text for one in found if one is not None for text in one)
        kept = {key: item[key] for key in ("source",) if key in item}
        return [
            {
                **kept, "id": f"{item['id']}-{number}", "content": text,
                "meta": {**item.get("meta", {}), "by": self.name, "class": item["id"]},
            }
            for number, text in enumerate(texts)
        ]  # fmt: skip

    def _read(self, value: Any) -> list[str]:
        texts = [" ".join(text.split()) for text in value["descriptions"]]
        for text in texts:
            check_words(text, self.least_words, 2 * self.max_words)
        check_distinct(texts)
        return texts
