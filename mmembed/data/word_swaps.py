"""Texts with two of their words or phrases in each other's places, by parts of speech (NegCLIP, arXiv 2210.01936).

    nouns          A bicycle rides a woman on a road         two nouns of one number
    adjectives     a black chair and a gray chair            two of a text
    adverbs        she slowly rises and quickly sits down
    verbs          who carry umbrellas and walk dogs         full verbs with their auxiliaries
    noun_phrases   a blue fence next to a little girl        of three words or more

The words are the same and what they say is not. Spaces, punctuation and the capital at the beginning stay where they
were; `a` before a vowel is not corrected. Parts of speech come from HanTa (pip install 'mmembed[data]'), whose package
holds a model each of English, German and Dutch; texts of another language would be swapped at random. Cost: 1.5 ms a
text of ten words, 0.3 s to load the tagger.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal

from mmembed.errors import ConfigError

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
    return [one for one in found if plain(one) != plain(text)]


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


def plain(text: str) -> str:
    """What of a text is compared: its words."""
    return " ".join(re.findall(r"\w+", text.casefold()))
