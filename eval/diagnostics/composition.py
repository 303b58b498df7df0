"""Whether the order of words counts: a text against the same words in other places, as ARO and SugarCrepe ask.

    shuffled       all words in a random order                        ARO, "order" (arXiv 2210.01936)
    neighbours     each word with the next in its place               ARO, order within pairs
    nouns, adjectives, verbs, noun_phrases   two of them exchanged    SugarCrepe, "swap" (arXiv 2306.14610); NegCLIP

The other side, a picture or a passage, stays. Right is the text as it was; chance is .5. A model that reads a bag of
words scores .5 at best, and so would one that swaps nothing: texts without a swap are left out. Some swaps are nonsense
that a language model can tell by itself (arXiv 2306.14610, section 3).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from mmembed.data.pair_makers.rendered_text import swap
from mmembed.data.word_swaps import Language, Swapped, plain, swaps_of, tagged
from mmembed.data.words import Word, join_words, split_words
from mmembed.errors import MmembedError

Order = Literal["shuffled", "neighbours"]
ORDERS: tuple[Order, ...] = get_args(Order)
SWAPS: tuple[Swapped, ...] = ("nouns", "adjectives", "verbs", "noun_phrases")


def reordered(text: str, order: Order, generator: np.random.Generator) -> str | None:
    """The words of a text in another order; None where all orders read the same, or it has fewer than three words.

    >>> reordered("a red bus here", "neighbours", np.random.default_rng(0))
    'red a here bus'
    """
    words = split_words(text)
    if len(words) < 3:
        return None
    if order == "neighbours":
        moved = swap(words, 1.0, generator)
    else:
        places = generator.permutation(len(words))
        moved = [Word(word.gap, words[place].text) for word, place in zip(words, places.tolist(), strict=True)]
    found = join_words(moved)
    return None if plain(found) == plain(text) else found


def swapped(text: str, kind: Swapped, language: Language, generator: np.random.Generator) -> str | None:
    """A text with two units of a kind exchanged, drawn from all pairs; None where there is none.

    Raises:
        ConfigError: the tagger of words is not installed.
    """
    words = tagged(text, language)
    found = swaps_of(text, words, kind, language) if words else []
    return found[int(generator.integers(len(found)))] if found else None


def preferred(right: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    """(N,) 1 where the text as it was scores above the altered one, one half where both are equal.

    Args:
        right, wrong: (N,) scores of the same other side.

    Raises:
        MmembedError: lengths differ, or there is none.
    """
    a, b = np.asarray(right, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise MmembedError(f"preferred: scores {a.shape} and {b.shape}; give two series of one length, not empty")
    return (a > b) + 0.5 * (a == b)
