"""MultiCSR's first stage: of a sentence, one that follows from it and one that contradicts it (arXiv 2310.10962).

A record is made of each: the sentence is the query, its entailment the positive, its contradiction a hard negative.
Both questions show two examples, as in the authors' code; prompts and examples are ours. The paper also refines this
stage by contrasting the next token's probabilities with those under a weaker instruction. That takes the probabilities
of all tokens at every step of decoding, which no server of ours gives and the authors did not release: it is left out,
and `multicsr_curate` is what refines. Cost: two answers an item.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Work
from data_tools.synthesis.templates import Template, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name, unquoted
from mmembed.errors import ConfigError
from mmembed.registry import Positive

_VARIABLES = ("sentence", "language")


class MultiCSRGenerate(AskingStage):
    """A record of a sentence: its entailment is relevant, its contradiction is not.

    Args:
        language: ISO 639-1 code of what is written; None takes the sentence's, unchecked.
        min_words, max_words: of what is written.
        instruction: of the records.
        entailment_template, contradiction_template: YAML files in the place of the packaged ones.
    """

    name: ClassVar[str] = "multicsr_generate"
    takes: ClassVar[frozenset[Kind]] = frozenset({"documents"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        language: str | None = None,
        min_words: Positive = 3,
        max_words: Positive = 64,
        max_tokens: Positive = 128,
        temperature: float | None = None,
        instruction: str | None = None,
        entailment_template: str | None = None,
        contradiction_template: str | None = None,
    ) -> None:
        if min_words > max_words:
            raise ConfigError(f"{self.name}: min_words {min_words} is above max_words {max_words}")
        self.language, self.words, self.instruction = language, (min_words, max_words), instruction
        self.max_tokens, self.temperature, self.in_words = max_tokens, temperature, language_name(language)
        self.templates = {
            relation: Template(f"multicsr_{relation}", path, below_root, _VARIABLES)
            for relation, path in (("entailment", entailment_template), ("contradiction", contradiction_template))
        }

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return [template.source for template in self.templates.values()]

    def work(self, item: Item, context: Context) -> Work:
        sentence = text_of(item["content"]).strip()
        if not sentence:
            return Dropped(item, "no text")
        found = yield [
            Ask(
                relation,
                template.messages({"sentence": sentence, "language": self.in_words}),
                filler(relation, (self.words[0] + self.words[1]) // 2),
                partial(self._read, sentence),
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                language=self.language,
            )
            for relation, template in self.templates.items()
        ]
        entailment, contradiction = found
        if entailment.casefold() == contradiction.casefold():
            return Dropped(item, "one text for both relations", entailment)
        documents = [
            {"content": text, "relevance": relevance, "id": f"{item['id']}-{relation}", "meta": {"by": self.name}}
            for relation, text, relevance in zip(self.templates, found, (1.0, 0.0), strict=True)
        ]
        record: Item = {key: item[key] for key in ("source", "meta") if key in item}
        told = {} if self.instruction is None else {"instruction": self.instruction}
        return [{"id": item["id"], "query": sentence, "documents": documents, **told, **record}]

    def _read(self, sentence: str, answer: str) -> str:
        text = unquoted(answer)
        check_words(text, *self.words)
        check_distinct([sentence, text])
        return text
