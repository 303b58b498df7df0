"""ESimCSE's pairs: a text, and the same text with some of its words said twice.

SimCSE's two sides are equally long, so a model can tell pairs by their length; repeating words changes the length and
hardly the meaning. Of n words d are drawn without replacement, and each is repeated behind itself:

d = min(n, k),  k ~ U{0, ..., max(2, int(rate n))}

Source: Wu et al., arXiv 2109.04380, section 3.1, rate .32. The released code draws from U{0, ..., that - 1} and caps it
at 10; the paper's rule is used. There sub-words are repeated, here words. The paper has dropout as well: give the model
some (`adapter.dropout`), because d may be 0. Its negatives beside the batch's, a queue of a momentum encoder, are
`negative_queue`. Cost: 160 us a pair of 120 words.

When: single sentences are to be compared (STS), where crops would leave too little.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mmembed.content import Text
from mmembed.data.pair_base import Pair, PairMaker
from mmembed.data.words import Word, join_words, split_words


class WordRepetition(PairMaker):
    """The document, and the document with some words repeated (ESimCSE).

    Args:
        rate: at most this part of the words is repeated, or two of them.
    """

    name: ClassVar[str] = "word_repetition"
    apart: ClassVar[bool] = True

    def __init__(self, rate: Annotated[float, Field(gt=0, le=1)] = 0.32) -> None:
        self.rate = rate

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        words = split_words(text)
        most = max(2, int(self.rate * len(words)))
        count = min(int(generator.integers(most + 1)), len(words))
        chosen = generator.choice(len(words), count, replace=False).tolist()
        return Pair((Text(text),), (Text(join_words(repeat(words, chosen))),))


def repeat(words: Sequence[Word], places: Collection[int]) -> list[Word]:
    """The words, those at `places` twice.

    >>> join_words(repeat(split_words("i like this apple"), {1, 3}))
    'i like like this apple apple'
    """
    chosen = set(places)
    twice = [(word, Word("", word.text)) if place in chosen else (word,) for place, word in enumerate(words)]
    return [word for some in twice for word in some]
