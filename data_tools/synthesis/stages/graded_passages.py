"""Graded passages: for a query, one passage for each level of relevance (SyCL, arXiv 2503.23239, section 3).

A language model writes all passages of a query in one answer, so that it sees what tells the levels apart. The levels
are those of TREC's deep-learning tracks: 3 answers the query wholly, 2 partly or unclearly, 1 is on its topic without
an answer, 0 is unrelated or misleading. The prompt is ours (templates/graded_passages.yaml): the paper's is not public.
Of demonstrations it shows those that have a passage at each level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Work
from data_tools.synthesis.templates import Template, as_answer, pictures_of, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name
from mmembed.errors import ConfigError
from mmembed.registry import Count, Positive

_VARIABLES = ("query", "instruction", "levels", "language", "min_words", "max_words")


class GradedPassages(AskingStage):
    """Passages at levels of relevance to a query.

    Args:
        levels: what is written, each a passage's relevance.
        language: ISO 639-1 code of what is written; None takes the query's, unchecked.
        min_words, max_words: of a passage: a request to the model, and a bound of what is taken (half as many, and
            twice as many, pass).
        keep_documents: the record's own documents stay in front, their positives at the highest level (the paper's
            mixed setting); otherwise passages take their place.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "graded_passages"
    takes: ClassVar[frozenset[Kind]] = frozenset({"queries", "records"})
    uses = frozenset({"demonstrations"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        levels: Sequence[Count] = (3, 2, 1, 0),
        language: str | None = None,
        min_words: Positive = 30,
        max_words: Positive = 120,
        max_tokens: Positive = 1024,
        temperature: float | None = None,
        keep_documents: bool = False,
        template: str | None = None,
    ) -> None:
        if len(set(levels)) < len(levels) or max(levels, default=0) == 0:
            raise ConfigError(f"{self.name}.levels: found {list(levels)}; give different levels, one of them above 0")
        if min_words > max_words:
            raise ConfigError(f"{self.name}: min_words {min_words} is above max_words {max_words}")
        language_name(language)
        self.levels, self.language, self.keep_documents = tuple(levels), language, keep_documents
        self.words, self.max_tokens, self.temperature = (min_words, max_words), max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)
        self.sample = {_key(level): filler(_key(level), (min_words + max_words) // 2) for level in levels}
        properties = {_key(level): {"type": "string", "minLength": 1, "maxLength": 12 * max_words} for level in levels}
        self.schema = {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        }  # fmt: skip

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        query = text_of(item["query"])
        values = {
            "query": query, "instruction": item.get("instruction", ""), "levels": self.levels,
            "language": language_name(self.language), "min_words": self.words[0], "max_words": self.words[1],
        }  # fmt: skip
        shown = [self._shown(one, values) for one in item.get("demonstrations", ())]
        context.notes["demonstrations without a passage at each level"] += shown.count(None)
        messages = self.template.messages(values, pictures_of(item["query"]), [one for one in shown if one is not None])
        (passages,) = yield [
            Ask(
                "passages", messages, self.sample, partial(self._read, query), self.schema, self.max_tokens,
                self.temperature, self.language,
            )
        ]  # fmt: skip
        made = [
            {"content": text, "relevance": float(level), "id": f"{item['id']}-level-{level}", "meta": {"by": self.name}}
            for level, text in passages.items()
        ]
        own = [self._raised(document) for document in item.get("documents", ())] if self.keep_documents else []
        record = {key: value for key, value in item.items() if key != "demonstrations"}
        return [{**record, "documents": [*own, *made]}]

    def _shown(self, record: Item, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """A labelled record as question and answer; None where it lacks a level, or has pictures."""
        of_level = {document.get("relevance", 1.0): document["content"] for document in record["documents"][::-1]}
        if not of_level.keys() >= {float(level) for level in self.levels}:
            return None
        contents = [record["query"], *(of_level[float(level)] for level in self.levels)]
        if any(pictures_of(content) for content in contents):
            return None
        question = {**values, "query": text_of(record["query"]), "instruction": record.get("instruction", "")}
        answer = {_key(level): text_of(of_level[float(level)]) for level in self.levels}
        return self.template.question(question), as_answer(answer)

    def _raised(self, document: dict[str, Any]) -> dict[str, Any]:
        relevant = document.get("relevance", 1.0) > 0
        return {**document, "relevance": float(max(self.levels))} if relevant else document

    def _read(self, query: str, value: Any) -> dict[int, str]:
        passages = {level: value[_key(level)].strip() for level in self.levels}
        for text in passages.values():
            check_words(text, self.words[0] // 2, self.words[1] * 2)
        check_distinct([query, *passages.values()])
        return passages


def _key(level: int) -> str:
    return f"level_{level}"
