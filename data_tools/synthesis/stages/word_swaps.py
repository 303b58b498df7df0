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

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from data_tools.synthesis.templates import reworded, text_of
from mmembed.errors import ConfigError
from mmembed.registry import Positive

Swapped = Literal["nouns", "adjectives", "adverbs", "verbs", "noun_phrases"]
Language = Literal["en", "de", "nl"]
_TOKEN = re.compile(r"n['’]t\b|['’]\w+|\w+?(?=n['’]t\b)|\w+(?:-\w+)*|[^\w\s]")
_PHRASE_WORDS = 3  # of a noun phrase that is swapped, at least, as the authors have it


@dataclass(frozen=True)
class Tags:
    """How the tags of a language begin. The first of `verbs` are full ones, which a verb phrase ends with."""

    model: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]
    verbs: tuple[str, ...]
    auxiliaries: tuple[str, ...]
    determiners: tuple[str, ...]


_OF_LANGUAGE = {
    "en": Tags(
        "morphmodel_en.pgz", ("NN",), ("AJ",), ("AV0",), ("VV",), ("VB", "VH", "VD", "VM"), ("AT0", "DT0", "DPS", "CRD")
    ),
    "de": Tags(
        "morphmodel_ger.pgz",
        ("NN",),
        ("ADJ(A)",),
        ("ADJ(D)", "ADV"),
        ("VV",),
        ("VA", "VM"),
        ("ART", "PIAT", "PPOSAT", "PDAT", "CARD"),
    ),
    "nl": Tags(
        "morphmodel_dutch.pgz",
        ("N(soort",),
        ("ADJ(prenom",),
        ("BW(", "ADJ(vrij"),
        ("WW(",),
        (),
        ("LID", "TW(hoofd", "VNW(bez"),
    ),
}  # of HanTa's models: C5, STTS and CGN


@dataclass(frozen=True)
class Word:
    """A token of a text, its place in it, and its part of speech."""

    text: str
    start: int
    end: int
    tag: str


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
            there = {_plain(text_of(content)) for content in _contents(item)}
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
            found = [one for one in swaps_of(text, words, kind, self.language) if _plain(one) not in there]
            if found and count < self.most:
                chosen = context.random(item, str(place), kind).choice(found)
                there.add(_plain(chosen))
                count += 1
                yield {
                    "content": reworded(document["content"], chosen),
                    "relevance": 0.0,
                    "id": f"{document.get('id') or f'{item}-{place}'}-swapped-{kind}",
                    "meta": {"by": self.name, "swapped": kind},
                }


def tagged(text: str, language: Language) -> list[Word]:
    """The words and punctuation marks of a text with HanTa's tags."""
    tokens = list(_TOKEN.finditer(text))
    tags = [tag for _, _, tag in _tagger(language).tag_sent([one.group() for one in tokens])]
    return [Word(one.group(), one.start(), one.end(), tag) for one, tag in zip(tokens, tags, strict=True)]


def swaps_of(text: str, words: Sequence[Word], kind: Swapped, language: Language) -> list[str]:
    """All texts in which two units of a kind have changed places, without those that read as before."""
    tags = _OF_LANGUAGE[language]
    if kind == "nouns":
        units = [(number, number + 1) for number, one in enumerate(words) if one.tag.startswith(tags.nouns)]
    elif kind in ("adjectives", "adverbs"):
        wanted = tags.adjectives if kind == "adjectives" else tags.adverbs
        units = [(number, number + 1) for number, one in enumerate(words) if one.tag.startswith(wanted)]
    else:
        units = list(verb_phrases(words, tags) if kind == "verbs" else noun_phrases(words, tags))
    pairs = combinations(units, 2)
    if kind == "nouns":
        pairs = (pair for pair in pairs if words[pair[0][0]].tag == words[pair[1][0]].tag)  # type: ignore[assignment]
    spans = (((words[a].start, words[b - 1].end), (words[c].start, words[d - 1].end)) for (a, b), (c, d) in pairs)
    found = dict.fromkeys(swapped(text, *pair, first=words[0].start) for pair in spans)
    return [one for one in found if _plain(one) != _plain(text)]


def swapped(text: str, one: tuple[int, int], other: tuple[int, int], first: int = 0) -> str:
    """A text with two spans, the first of which ends before the other begins, in each other's places.

    Args:
        first: where the first word begins, whose capital belongs to the place and not to the word.

    >>> swapped("The dog bites a man.", (4, 7), (16, 19))
    'The man bites a dog.'
    >>> swapped("Dogs bite men.", (0, 4), (10, 13))
    'Men bite dogs.'
    """
    left, right = text[slice(*one)], text[slice(*other)]
    if one[0] == first and left[:1].isupper() and not left[1:2].isupper() and right[:1].islower():
        left, right = left[:1].lower() + left[1:], right[:1].upper() + right[1:]
    return text[: one[0]] + right + text[one[1] : other[0]] + left + text[other[1] :]


def noun_phrases(words: Sequence[Word], tags: Tags) -> Iterator[tuple[int, int]]:
    """Spans (from, to) of a determiner, adjectives and nouns, at least three words."""
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and words[end].tag.startswith(tags.determiners):
            end += 1
        while end < len(words) and words[end].tag.startswith((*tags.adjectives, *tags.nouns)):
            end += 1
        if end - start >= _PHRASE_WORDS and words[end - 1].tag.startswith(tags.nouns):
            yield start, end
        start = max(end, start + 1)


def verb_phrases(words: Sequence[Word], tags: Tags) -> Iterator[tuple[int, int]]:
    """Spans (from, to) of auxiliaries, adverbs and the full verb that they end with."""
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and words[end].tag.startswith((*tags.verbs, *tags.auxiliaries, *tags.adverbs)):
            end += 1
        full = [place for place in range(start, end) if words[place].tag.startswith(tags.verbs)]
        if full:
            begins = next(n for n in range(start, end) if words[n].tag.startswith((*tags.verbs, *tags.auxiliaries)))
            yield begins, full[-1] + 1
        start = max(end, start + 1)


@cache
def _tagger(language: Language) -> Any:
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError:
        raise ConfigError("word_swaps: HanTa is not installed; pip install 'mmembed[data]'") from None
    return HanoverTagger(_OF_LANGUAGE[language].model)


def _contents(item: Item) -> list[Any]:
    return [item["query"], *(document["content"] for document in item["documents"])]


def _plain(text: str) -> str:
    """What of a text is compared: its words."""
    return " ".join(re.findall(r"\w+", text.casefold()))
