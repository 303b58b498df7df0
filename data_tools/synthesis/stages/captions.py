"""Captions of pictures at levels of relevance: graded passages (SyCL, arXiv 2503.23239, section 3) for pictures.

    image_to_text    a record a picture: the picture is the query, its captions are the documents
    text_to_image    a record a caption from `positive_from` on: the caption is the query, the picture the document

A multimodal model sees the picture and writes all captions in one answer. The paper grades passages; what a level means
for a caption is ours: 3 describes this picture and hardly another one, 2 is right and says little, 1 is of the same
subject and wrong in what matters, 0 describes something else. A caption of level 1 differs from the best one in an
object, an attribute, a number or a relation: a hard negative where training takes levels from 2 on as positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Work
from data_tools.synthesis.templates import Template, pictures_of, text_of
from data_tools.synthesis.wording import check_distinct, check_words, filler, language_name, shortened
from mmembed.errors import ConfigError
from mmembed.registry import Count, Positive

_VARIABLES = ("text", "levels", "language", "min_words", "max_words", "described")


class Captions(AskingStage):
    """Captions at levels.

    Args:
        levels: what is written, each a caption's relevance.
        direction: image_to_text or text_to_image.
        positive_from: of text_to_image: captions of lower levels make no record.
        language: ISO 639-1 code of the captions.
        min_words, max_words: of a caption: a request to the model, and a bound of what is taken (half as many, and
            twice as many, pass).
        instruction: of the records.
        most_characters: of a text beside the picture that are shown.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "captions"
    takes: ClassVar[frozenset[Kind]] = frozenset({"documents"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        levels: Sequence[Count] = (3, 2, 1, 0),
        direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
        positive_from: Positive | None = None,
        language: str = "en",
        min_words: Positive = 8,
        max_words: Positive = 40,
        instruction: str | None = None,
        most_characters: Positive = 2000,
        max_tokens: Positive | None = None,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if len(set(levels)) < len(levels) or max(levels, default=0) == 0:
            raise ConfigError(f"captions.levels: found {list(levels)}; give different levels, one of them above 0")
        if min_words > max_words:
            raise ConfigError(f"captions: min_words {min_words} is above max_words {max_words}")
        if positive_from is not None and direction == "image_to_text":
            raise ConfigError(
                "captions.positive_from has no effect with direction 'image_to_text', which keeps all levels; remove it"
            )
        self.positive_from = min(2, max(levels)) if positive_from is None else positive_from
        if self.positive_from > max(levels):
            raise ConfigError(f"captions.positive_from {self.positive_from} is above all levels {list(levels)}")
        self.levels, self.direction, self.language = tuple(levels), direction, language
        self.words, self.instruction, self.most_characters = (min_words, max_words), instruction, most_characters
        self.max_tokens, self.temperature = max_tokens, temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)
        self.sample = {_key(level): filler(_key(level), (min_words + max_words) // 2) for level in levels}
        one = {"type": "string", "minLength": 1, "maxLength": 12 * 2 * max_words}
        properties = {_key(level): one for level in levels}
        self.schema = {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        }  # fmt: skip
        self.told_language = language_name(language)

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        pictures = pictures_of(item["content"])
        if not pictures:
            return Dropped(item, "no picture")
        values = {
            "text": shortened(text_of(item["content"]), self.most_characters), "levels": self.levels,
            "language": self.told_language, "min_words": self.words[0], "max_words": self.words[1], "described": "",
        }  # fmt: skip
        messages = self.template.messages(values, pictures)
        (captions,) = yield [
            Ask(
                "captions", messages, self.sample, self._read, self.schema, self.max_tokens, self.temperature,
                self.language,
            )
        ]  # fmt: skip
        shown = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
        also = {"instruction": self.instruction, "source": item.get("source")}
        told = {key: value for key, value in also.items() if value}
        if self.direction == "image_to_text":
            documents = [
                {"content": text, "relevance": float(level), "id": f"{item['id']}-level-{level}", "meta": self._meta()}
                for level, text in captions.items()
            ]
            return [{"id": f"{item['id']}-captions", "query": shown, "documents": documents, **told}]
        return [
            {
                "id": f"{item['id']}-level-{level}", "query": text, "meta": self._meta(), **told,
                "documents": [{"content": shown, "relevance": float(level), "id": item["id"]}],
            }
            for level, text in captions.items() if level >= self.positive_from
        ]  # fmt: skip

    def _meta(self) -> dict[str, str]:
        return {"by": self.name, "language": self.language}

    def _read(self, value: Any) -> dict[int, str]:
        captions = {level: value[_key(level)].strip() for level in self.levels}
        for text in captions.values():
            check_words(text, max(1, self.words[0] // 2), self.words[1] * 2)
        check_distinct(list(captions.values()))
        return captions


def _key(level: int) -> str:
    return f"level_{level}"
