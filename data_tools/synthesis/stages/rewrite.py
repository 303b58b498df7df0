"""Rewrites: the same content in other words, as further texts to train on.

    caption   as another person would describe the picture       LaCLIP (arXiv 2305.20088)
    easy      in words that a small child understands            WRAP, Rephrasing the Web (arXiv 2401.16380)
    medium    in the clear style of an encyclopaedia             WRAP
    hard      in terse, scholarly words                          WRAP
    qa        as questions and answers                           WRAP
    summary   in one sentence                                    after GIST (arXiv 2307.11315)

Of a record the positives are rewritten: rewrites stand beside the original as further positives under its id, since
documents of one id are never negatives of each other. Training with `positives_per_query: 1` draws one of them at each
visit, all with the same chance, after LaCLIP. With `of: query` each rewrite of the query is a record with the same
documents. Of documents and queries each rewrite is an item of its own.

A rewrite under `least_words` is asked for again; if none is usable, the text has one rewrite less, and the original's
share of the draws grows among fewer. Papers are followed after their abstracts: prompts, styles' words and examples
(two captions in the template) are ours. Cost: one answer a text, style and `each`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Ask, AskingStage, Context, Item, Kind, Work
from data_tools.synthesis.templates import Template, reworded, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name, unquoted
from mmembed.errors import ConfigError
from mmembed.registry import Positive

Style = Literal["caption", "easy", "medium", "hard", "qa", "summary"]
_VARIABLES = ("text", "style", "language")
_KEPT_LINES = ("qa",)  # styles whose line breaks mean something


class Rewrite(AskingStage):
    """Texts in other words.

    Args:
        styles: how a text is rewritten, each by itself.
        each: rewrites a style.
        of: of records, whether the positives (the default) or the query are rewritten.
        keep_original: false leaves the original out where a rewrite takes its place.
        language: ISO 639-1 code of what is written; None takes the text's, unchecked.
        least_words: of a rewrite.
        most_words: of a rewrite.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "rewrite"

    def __init__(
        self,
        below_root: Callable[[str], Path],
        styles: Sequence[Style] = ("caption",),
        each: Positive = 1,
        of: Literal["positives", "query"] | None = None,
        keep_original: bool = True,
        language: str | None = None,
        least_words: Positive = 2,
        most_words: Positive = 300,
        max_tokens: Positive | None = None,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if not styles or len(set(styles)) < len(styles):
            raise ConfigError(f"{self.name}.styles: found {list(styles)}; give at least one, each once")
        if least_words > most_words:
            raise ConfigError(f"{self.name}: least_words {least_words} is above most_words {most_words}")
        if each > 1 and temperature == 0:
            raise ConfigError(f"{self.name}: {each} rewrites a style at temperature 0 are one; raise the temperature")
        self.styles, self.each, self.of, self.keep_original = tuple(styles), each, of, keep_original
        self.language, self.words, self.in_words = language, (least_words, most_words), language_name(language)
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)

    def gives(self, kind: Kind) -> Kind:
        if self.of is not None and kind != "records":
            raise ConfigError(f"{self.name}.of: '{self.of}' has no effect on {kind}; remove it")
        return kind

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        contents = self._contents(item)
        asks = [ask for place, content in contents.items() for ask in self._asks(place, text_of(content))]
        answers = iter((yield asks) if asks else [])
        made: dict[int, list[tuple[str, str]]] = {}
        for place, content in contents.items():
            tried = [(style, next(answers)) for style in self._tries(content)]
            found = list(_new(tried))
            lost = sum(text is None for _, text in tried)
            context.notes["lost rewrites"] += lost
            context.notes["rewrites that repeat another one"] += len(tried) - lost - len(found)
            made[place] = found
        return self._items(item, contents, made)

    def _contents(self, item: Item) -> dict[int, Any]:
        """What is rewritten, by the place of its document; 0 where it is the item itself."""
        if "documents" in item and self.of != "query":
            documents = enumerate(item["documents"])
            return {place: one["content"] for place, one in documents if one.get("relevance", 1.0) > 0}
        return {0: item["content"] if "content" in item else item["query"]}

    def _tries(self, content: Any) -> list[str]:
        """The styles in which a content is asked for; none of one without text."""
        return [style for style in self.styles for _ in range(self.each)] if text_of(content).strip() else []

    def _asks(self, place: int, text: str) -> Iterator[Ask]:
        for number, style in enumerate(self._tries(text)):
            yield Ask(
                f"{place}-{style}-{number % self.each}",
                self.template.messages({"text": text, "style": style, "language": self.in_words}),
                filler(f"{place}-{style}-{number}", max(self.words[0], min(self.words[1], len(text.split()) + 2))),
                partial(self._read, text, style),
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                language=self.language,
                optional=True,
            )

    def _read(self, text: str, style: str, answer: str) -> str:
        rewritten = answer if style in _KEPT_LINES else unquoted(answer)
        check_words(rewritten, *self.words)
        check_distinct([text, rewritten])
        return rewritten

    def _items(self, item: Item, contents: dict[int, Any], made: dict[int, list[tuple[str, str]]]) -> list[Item]:
        if "documents" in item and self.of != "query":
            documents: list[Any] = []
            for place, document in enumerate(item["documents"]):
                documents += self._documents(document, f"{item['id']}-{place}", made.get(place, []))
            return [{**item, "documents": documents}]
        key, found = ("content" if "content" in item else "query"), made[0]
        items = [item] if self.keep_original or not found else []
        for number, (style, text) in enumerate(found):
            meta = {**item.get("meta", {}), "by": self.name, "style": style, "of": item["id"]}
            name = f"{item['id']}-{style}-{number}"
            items.append({**item, "id": name, key: reworded(contents[0], text), "meta": meta})
        return items

    def _documents(self, document: Any, name: str, found: list[tuple[str, str]]) -> list[Any]:
        """A document and its rewrites, under one id."""
        if not found:
            return [document]
        original = {**document, "id": document.get("id") or name}
        written = [
            {**original, "content": reworded(document["content"], text), "meta": {"by": self.name, "style": style}}
            for style, text in found
        ]
        return [*([original] if self.keep_original else []), *written]


def _new(tried: list[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Rewrites that there are, each once."""
    seen: set[str] = set()
    for style, text in tried:
        if text is not None and text.casefold() not in seen:
            seen.add(text.casefold())
            yield style, text
