"""Words and sentences of a text of any script, without a tokenizer or a model.

Makers of pairs cut, drop and repeat words, not the sub-words of one tokenizer: a crop then begins where a word begins,
and the pairs of a run do not change with its backbone. Where a script puts no spaces between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Tibetan) each character with its marks is one. Cost: 70 us for 120 words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

_UNSPACED = (
    "\\u0e00-\\u0fff"  # Thai, Lao, Tibetan
    "\\u1000-\\u109f\\u1780-\\u17ff"  # Burmese, Khmer
    "\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff"  # kana, Han
    "\\U00020000-\\U0003ffff"  # rare Han
)
_WORD = re.compile(f"([{_UNSPACED}])|[^\\s{_UNSPACED}]+")
_TOUCHING = re.compile(f"[{_UNSPACED}]")
_ENDS = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])[」』”’）]*\s*|\n+")
_LEAST_WORDS = 3  # "Dr." and "No. 5" are no sentences: what is shorter belongs to the next one
# Scripts of which a lexical search takes pairs of characters: Thai, Japanese, Chinese, Korean.
_NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_RUNS = re.compile(rf"(?P<unspaced>(?:(?=[{_NO_SPACES}])\w)+)|[^\W{_NO_SPACES}]+")


class Word(NamedTuple):
    """A word and the white space before it."""

    gap: str
    text: str


def split_words(text: str) -> list[Word]:
    """The words in order; joined, they give the text again, without the white space around it.

    >>> [word.text for word in split_words("Crops of 東京 begin anywhere.")]
    ['Crops', 'of', '東', '京', 'begin', 'anywhere.']
    """
    words: list[Word] = []
    at = 0
    for found in _WORD.finditer(text):
        if found[1] and words and found.start() == at and unicodedata.category(found[1]).startswith("M"):
            words[-1] = Word(words[-1].gap, words[-1].text + found[1])  # a vowel sign belongs to its letter
        else:
            words.append(Word(text[at : found.start()], found[0]))
        at = found.end()
    return words


def join_words(words: Iterable[Word]) -> str:
    """A text of words, each with the space that was before it; none before the first.

    Words that had others between them get a space where their script writes one.

    >>> join_words([Word("", "bus"), Word("", "bus"), Word("", "東"), Word("", "東")])
    'bus bus東東'
    """
    parts: list[str] = []
    for gap, text in words:
        if parts and not gap and not (_TOUCHING.match(parts[-1][-1]) or _TOUCHING.match(text)):
            gap = " "
        parts += [gap, text]
    return "".join(parts).strip()


def terms(text: str) -> list[str]:
    """Words as a language model of bags of words counts them: lower case, without punctuation around them.

    >>> terms("The Amazon (Portuguese: Amazônia), is a rainforest!")
    ['the', 'amazon', 'portuguese', 'amazônia', 'is', 'a', 'rainforest']
    """
    stripped = (_bare(word.text).lower() for word in split_words(text))
    return [term for term in stripped if term]


def split_sentences(text: str) -> list[str]:
    """Sentences in order: they end with a mark and a space, or with a line. Very short ones go with the next.

    >>> split_sentences("It rained all day. Dr. Smith stayed at home! He read a book.")
    ['It rained all day.', 'Dr. Smith stayed at home!', 'He read a book.']
    """
    pieces: list[str] = []
    at = 0
    for end in (*(found.end() for found in _ENDS.finditer(text)), len(text)):
        if len(split_words(text[at:end])) >= _LEAST_WORDS:
            pieces.append(text[at:end].strip())
            at = end
    if text[at:].strip():
        pieces = [*pieces[:-1], f"{pieces[-1]} {text[at:].strip()}"] if pieces else [text.strip()]
    return pieces


def _bare(word: str) -> str:
    letters = [index for index, letter in enumerate(word) if letter.isalnum()]
    return word[letters[0] : letters[-1] + 1] if letters else ""


def search_words(text: str) -> list[str]:
    """What a lexical search compares: lower-cased words without punctuation; no stemming, no stop words.

    Thai, Japanese, Chinese and Korean (which has spaces between phrases) give pairs of characters.

    >>> search_words("To be, or 東京都")
    ['to', 'be', 'or', '東京', '京都']
    """
    tokens: list[str] = []
    for run in _RUNS.finditer(text.lower()):
        token = run.group()
        if run.lastgroup == "unspaced" and len(token) > 1:
            tokens += [token[start : start + 2] for start in range(len(token) - 1)]
        else:
            tokens.append(token)
    return tokens
