"""Sub-captions: sentences of a long description of a picture, its positives, after DreamLIP (arXiv 2403.17007).

A multimodal model describes the picture at length; every sentence that is long enough is a caption of its own. The
picture becomes the query, its own text the first positive, the sentences those behind it. Objective `dreamlip` takes as
many as its `captions` says, `alip` the first text and one sentence (`captions: 1`). For long captions of several models
run the stage several times with other generators: sentences that are there are not added again. Cost: one long answer a
picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, pictures_of, text_of
from data_tools.synthesis.wording import filler, language_name, words
from mmembed.content import Text, to_content
from mmembed.data.records import content_to_json
from mmembed.errors import ConfigError
from mmembed.registry import Positive

_VARIABLES = ("captions", "language")
_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|(?<=[。！？])|\s*\n\s*")
_ABBREVIATED = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|No|vs|approx|e\.g|i\.e)|\b[A-Z])\.$")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+", re.MULTILINE)


class SubCaptions(AskingStage):
    """Several captions of a picture.

    Args:
        captions: sentences that are kept, the first ones.
        least: sentences that a description must have; with fewer it is asked for again.
        least_words: of a sentence.
        keep_text: the text beside the picture is the first positive; false drops it.
        language: ISO 639-1 code of what is written; None takes the model's.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "sub_captions"
    takes: ClassVar[frozenset[Kind]] = frozenset({"documents", "records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        captions: Positive = 8,
        least: Positive = 1,
        least_words: Positive = 4,
        keep_text: bool = True,
        language: str | None = None,
        max_tokens: Positive | None = None,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if least > captions:
            raise ConfigError(f"{self.name}: least {least} is above captions {captions}")
        self.captions, self.least, self.least_words, self.keep_text = captions, least, least_words, keep_text
        self.language, self.in_words = language, language_name(language)
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        content = item["content"] if "content" in item else item["query"]
        pictures = pictures_of(content)
        if not pictures:
            return Dropped(item, "no picture")
        messages = self.template.messages({"captions": self.captions, "language": self.in_words}, pictures)
        sample = " ".join(filler(f"Sentence {n}", max(10, self.least_words)) + "." for n in range(self.captions))
        ask = Ask("description", messages, sample, self._read, None, self.max_tokens, self.temperature, self.language)
        (sentences,) = yield [ask]
        record = self._record(item, content)
        there = {text_of(one["content"]).casefold() for one in record["documents"]}
        new = [text for text in sentences if text.casefold() not in there][: self.captions]
        context.notes["sub-captions"] += len(new)
        taken = len(record["documents"])
        record["documents"] += [
            {"content": text, "relevance": 1.0, "id": f"{item['id']}-caption-{taken + n}", "meta": {"by": self.name}}
            for n, text in enumerate(new)
        ]
        return [record]

    def _record(self, item: Item, content: Any) -> Item:
        """The record so far: of an item that is one, itself."""
        if "documents" in item:
            return {**item, "documents": list(item["documents"])}
        parts = to_content(content)
        record: Item = {key: item[key] for key in ("id", "source", "meta") if key in item}
        record["query"] = content_to_json(tuple(part for part in parts if not isinstance(part, Text)))
        text = text_of(content).strip()
        own = [{"content": text, "relevance": 1.0, "id": f"{item['id']}-text"}] if text and self.keep_text else []
        return {**record, "documents": own}

    def _read(self, answer: str) -> list[str]:
        found = [text for text in sentences_of(answer) if words(text) >= self.least_words]
        if len(found) < self.least:
            raise Unusable("too few sentences", f"{len(found)}: {answer[:100]}")
        return found


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each once; marks of lists are taken off.

    >>> sentences_of("A man waits. He wears a hat! 2.5 m behind him is Dr. Lee.")
    ['A man waits.', 'He wears a hat!', '2.5 m behind him is Dr. Lee.']
    """
    found: list[str] = []
    for part in _END.split(_BULLET.sub("", text)):
        piece = part.strip()
        if found and _ABBREVIATED.search(found[-1]):
            found[-1] = f"{found[-1]} {piece}".strip()
        elif piece:
            found.append(piece)
    return list(dict.fromkeys(found))
