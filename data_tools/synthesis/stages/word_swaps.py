"""Hard negatives by swapping words of a text with each other, without a language model (NegCLIP, arXiv 2210.01936).

    nouns          A bicycle rides a woman on a road         two nouns of one number
    adjectives     a black chair and a gray chair            two of a text
    adverbs        she slowly rises and quickly sits down
    verbs          who carry umbrellas and walk dogs         full verbs with their auxiliaries
    noun_phrases   a blue fence next to a little girl        of three words or more

The words are the same and what they say is not: what the authors' training set holds. Of each kind one swap is drawn
for each positive of a record; results become documents of relevance 0. What reads like the original (the two words are
alike) or like another document of the record is left out, and so is a second copy. Spaces, punctuation and the capital
at the beginning stay where they were; `a` before a vowel is not corrected, as it is not there.

Parts of speech come from HanTa (pip install 'mmembed[data]'), whose package holds a model each of English, German and
Dutch; of other languages nothing is known, and the option is refused. Texts in another language than the option's
would be swapped at random: filter by language first. Some results are nonsense that a model can tell by reading alone;
`composition_negatives` writes plausible ones. Cost: 1.5 ms a text of ten words, 0.3 s to load the tagger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from data_tools.synthesis.templates import reworded, text_of
from mmembed.data.word_swaps import Language, Swapped, plain, swaps_of, tagged
from mmembed.errors import ConfigError
from mmembed.registry import Positive


class WordSwaps(SetStage):
    """Texts of which two words have changed places, as hard negatives.

    Args:
        swaps: what is swapped, a draw of each.
        most: negatives a positive, the first ones in the order of `swaps`.
        language: of the positives.
    """

    name: ClassVar[str] = "word_swaps"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        swaps: Sequence[Swapped] = ("noun_phrases", "nouns", "adjectives", "adverbs", "verbs"),
        most: Positive = 4,
        language: Language = "en",
    ) -> None:
        if not swaps or len(set(swaps)) < len(swaps):
            raise ConfigError(f"{self.name}.swaps: found {list(swaps)}; give at least one, each once")
        self.swaps, self.most, self.language = tuple(swaps), most, language

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        for item in items:
            there = {plain(text_of(content)) for content in _contents(item)}
            made: list[Any] = []
            for place, document in enumerate(item["documents"]):
                if document.get("relevance", 1.0) > 0:
                    made += self._negatives(item["id"], place, document, there, context)
            context.notes["records without a swap"] += not made
            context.notes["negatives"] += len(made)
            yield {**item, "documents": [*item["documents"], *made]}

    def _negatives(
        self, item: str, place: int, document: Any, there: set[str], context: Context
    ) -> Iterator[dict[str, Any]]:
        """Negatives of a positive; what they read is put into `there`."""
        text, count = text_of(document["content"]), 0
        words = tagged(text, self.language)
        for kind in self.swaps:
            found = [one for one in swaps_of(text, words, kind, self.language) if plain(one) not in there]
            if found and count < self.most:
                chosen = context.random(item, str(place), kind).choice(found)
                there.add(plain(chosen))
                count += 1
                yield {
                    "content": reworded(document["content"], chosen),
                    "relevance": 0.0,
                    "id": f"{document.get('id') or f'{item}-{place}'}-swapped-{kind}",
                    "meta": {"by": self.name, "swapped": kind},
                }


def _contents(item: Item) -> list[Any]:
    return [item["query"], *(document["content"] for document in item["documents"])]
