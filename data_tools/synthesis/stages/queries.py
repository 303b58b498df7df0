"""Queries for documents: of several types, all of a document in one answer; each query is a record with the document.

After the abstract of Promptagator (arXiv 2209.11755): a model writes the queries of a task, a few examples shown. The
types and their lengths are ours, and so is writing several at once: the model sees what it has asked already. All
records of a document carry its id, so none of them takes it for a negative of another one. A query that breaks a rule
is left out and counted; an answer is asked for again where none is left. Whether a search finds the document again (a
filter in its manner) is for `retrieve` and `judge`; here a query must not repeat a run of the document's words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, as_answer, pictures_of, text_of
from data_tools.synthesis.wording import check_words, copies_run, filler, language_name, shortened, words
from mmembed.errors import ConfigError, nearest
from mmembed.registry import Positive

TYPES = {  # words of a query, at least and at most
    "keyword": (2, 6), "question": (5, 20), "instruction": (8, 35), "long": (30, 90), "claim": (6, 25),
    "title": (3, 12),
}  # fmt: skip
_OF_NO_TYPE = (3, 40)
_VARIABLES = ("document", "plan", "instruction", "language")
_CHARACTERS = 12  # of a word, at most


class Queries(AskingStage):
    """Queries that a document answers.

    Args:
        types: of queries: keyword, question, instruction, long, claim, title; with a template of your own any others.
        per_document: queries of a document; the types take turns from a drawn one on.
        words: bounds of a type's queries, [least, most], in the place of its own: a request to the model, and a bound
            of what is taken (half as many, and twice as many, pass).
        languages: ISO 639-1 codes of the queries, of which one is drawn for each document; none takes the document's,
            unchecked. Others than the document's make cross-lingual records.
        copied_words: a query that repeats so many words of the document in a row is left out; None takes all.
        instruction: of the records, or one for each type; the model is told it, too.
        most_characters: of a document that are shown.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "queries"
    takes: ClassVar[frozenset[Kind]] = frozenset({"documents"})
    uses = frozenset({"demonstrations"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        types: Sequence[str] = ("keyword", "question", "instruction"),
        per_document: Positive = 3,
        words: Mapping[str, Sequence[Positive]] | None = None,
        languages: Sequence[str] = (),
        copied_words: Positive | None = 8,
        instruction: str | Mapping[str, str] | None = None,
        most_characters: Positive = 6000,
        max_tokens: Positive = 1024,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        self.template = Template(self.name, template, below_root, _VARIABLES)
        self.types, self.per_document, self.copied_words = tuple(types), per_document, copied_words
        self._check_types(template is None)
        self.words = {one: _bounds(one, (words or {}).get(one)) for one in self.types}
        self._check_keys("words", words or {})
        if not isinstance(instruction, str):
            self._check_keys("instruction", instruction or {})
        self.instruction, self.languages = instruction, tuple(languages)
        for code in self.languages:
            language_name(code)
        self.most_characters, self.max_tokens, self.temperature = most_characters, max_tokens, temperature
        longest = max(most for _, most in self.words.values())
        one = {"type": "string", "minLength": 1, "maxLength": 2 * _CHARACTERS * longest}
        queries = {"type": "array", "items": one, "minItems": per_document, "maxItems": per_document}
        self.schema = {
            "type": "object", "properties": {"queries": queries}, "required": ["queries"],
            "additionalProperties": False,
        }  # fmt: skip

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        draw = context.random(item["id"])
        language = draw.choice(self.languages) if self.languages else None
        first = draw.randrange(len(self.types))
        types = [self.types[(first + place) % len(self.types)] for place in range(self.per_document)]
        document = text_of(item["content"])
        values = self._values(document, types, self.words, language)
        shown = [self._shown(one) for one in item.get("demonstrations", ())]
        context.notes["demonstrations with pictures"] += shown.count(None)
        messages = self.template.messages(values, pictures_of(item["content"]), [one for one in shown if one])
        sample = {"queries": [filler(f"query-{place}", sum(self.words[one]) // 2) for place, one in enumerate(types)]}
        read = partial(self._read, document, types)
        (taken,) = yield [
            Ask("queries", messages, sample, read, self.schema, self.max_tokens, self.temperature, language)
        ]
        queries, unusable = taken
        context.notes.update({f"queries left out: {kind}": count for kind, count in unusable.items()})
        context.notes.update(f"queries of type {types[place]}" for place in queries)
        positive = {"content": item["content"], "relevance": 1.0, "id": item["id"]}
        return [self._record(item, place, types[place], query, language, positive) for place, query in queries.items()]

    def _record(
        self, item: Item, place: int, kind: str, query: str, language: str | None, positive: dict[str, Any]
    ) -> Item:
        instruction = self.instruction if isinstance(self.instruction, str) else (self.instruction or {}).get(kind)
        meta = {"by": self.name, "type": kind, **({} if language is None else {"language": language})}
        record = {"id": f"{item['id']}-query-{place}", "query": query, "documents": [positive], "meta": meta}
        told = {"instruction": instruction, "source": item.get("source")}
        return record | {key: value for key, value in told.items() if value}

    def _values(
        self, document: str, types: Sequence[str], bounds: Mapping[str, tuple[int, int]], language: str | None
    ) -> dict[str, Any]:
        plan = [{"type": one, "least": bounds[one][0], "most": bounds[one][1]} for one in types]
        instruction = self.instruction if isinstance(self.instruction, str) else ""
        shown = shortened(document, self.most_characters)
        return {"document": shown, "plan": plan, "instruction": instruction, "language": language_name(language)}

    def _shown(self, record: Item) -> tuple[str, str] | None:
        """A labelled record as question and answer; None where it has pictures."""
        best = max(record["documents"], key=lambda document: document["relevance"])["content"]
        if pictures_of(best) or pictures_of(record["query"]):
            return None
        query, kind = text_of(record["query"]), record.get("meta", {}).get("type", "query")
        bounds = {kind: self.words.get(kind, (max(1, words(query) - 2), words(query) + 2))}
        question = self.template.question(self._values(text_of(best), [kind], bounds, None))
        return question, as_answer({"queries": [query]})

    def _read(self, document: str, types: Sequence[str], value: Any) -> tuple[dict[int, str], Counter[str]]:
        """The queries that can be used, by their places, and why others cannot."""
        queries, unusable, seen = dict[int, str](), Counter[str](), set[str]()
        for place, (kind, text) in enumerate(zip(types, value["queries"], strict=True)):
            query, (least, most) = text.strip(), self.words[kind]
            plain = " ".join(query.casefold().split())
            try:
                check_words(query, max(1, least // 2), most * 2)
                if plain in seen:
                    raise Unusable("a query twice", query)
                if self.copied_words is not None and copies_run(query, document, self.copied_words):
                    raise Unusable("copied from the document", query)
            except Unusable as error:
                unusable[error.kind] += 1
                last = error
                continue
            seen.add(plain)
            queries[place] = query
        if not queries:
            raise last
        return queries, unusable

    def _check_types(self, packaged: bool) -> None:
        if not self.types or len(set(self.types)) < len(self.types):
            raise ConfigError(f"queries.types: found {list(self.types)}; give different types, at least one")
        for one in self.types:
            if packaged and one not in TYPES:
                raise ConfigError(
                    f"queries.types: the packaged template has no '{one}'; {nearest(one, TYPES)} Others need a "
                    "template that says what they are"
                )

    def _check_keys(self, option: str, given: Mapping[str, Any]) -> None:
        for key in given:
            if key not in self.types:
                raise ConfigError(f"queries.{option}: there is no type '{key}' in types; {nearest(key, self.types)}")


def _bounds(kind: str, given: Sequence[int] | None) -> tuple[int, int]:
    if given is None:
        return TYPES.get(kind, _OF_NO_TYPE)
    if len(given) != 2 or given[0] > given[1]:
        raise ConfigError(f"queries.words.{kind}: found {list(given)}; give [least, most]")
    return given[0], given[1]
