"""Texts in the wanted languages, told by py3langid (`data_tools.languages`: its accuracy, and how sure is sure enough).

Short texts say little about their language ("Taxi?"), so they pass, and so does a text of which the guess is unsure:
what is left out is surely in another language. Cost: 0.2 ms a sentence, 1 ms a passage; no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from data_tools.languages import SURE, UNDETERMINED, identify, known_languages
from data_tools.synthesis.sides import Fault, Side, check_sides, sifted
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from data_tools.synthesis.templates import text_of
from mmembed.errors import ConfigError, nearest
from mmembed.registry import Count, Weight


class Language(SetStage):
    """Keeps texts in some languages.

    Args:
        languages: ISO 639-1 codes that the texts may be in.
        query, document: of this side, in their place.
        confidence: of a guess that counts, from 0 to 1.
        min_characters: shorter texts pass.
    """

    name: ClassVar[str] = "language"

    def __init__(
        self,
        languages: Sequence[str] = (),
        query: Sequence[str] = (),
        document: Sequence[str] = (),
        confidence: Weight = SURE,
        min_characters: Count = 20,
    ) -> None:
        known = known_languages()
        for code in (*languages, *query, *document):
            if code not in known:
                raise ConfigError(f"{self.name}: '{code}' is no language that is told; {nearest(code, known)}")
        if not languages and not query and not document:
            raise ConfigError(f"{self.name}: takes all languages; give languages: [en]")
        if confidence > 1:
            raise ConfigError(f"{self.name}.confidence: found {confidence}; give 0 to 1")
        own: dict[Side, Sequence[str]] = {"query": query, "document": document}
        self.given = [side for side, codes in own.items() if codes]
        both: dict[Side, Sequence[str]] = {"query": query or languages, "document": document or languages}
        self.wanted = {side: codes for side, codes in both.items() if codes}
        self.confidence, self.min_characters = confidence, min_characters

    def gives(self, kind: Kind) -> Kind:
        check_sides(self.name, kind, self.given)
        return kind

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        def verdict(side: Side, content: Any) -> Fault | None:
            text = text_of(content)
            if side not in self.wanted or len(text) < self.min_characters:
                return None
            ((found, confidence),) = identify([text])
            if found in (UNDETERMINED, *self.wanted[side]):
                return None
            if confidence < self.confidence:
                context.notes["texts of an unsure language, kept"] += 1
                return None
            return Fault("another language", f"{found} ({confidence:.2f})")

        for item in items:
            yield from sifted(item, verdict)
