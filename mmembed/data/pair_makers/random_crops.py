"""Contriever's pairs: two independent crops of one piece of a document.

A window of at most `chunk_length` words is drawn from the document, then each side for itself:

length = max(least_words, int(n r)),  r ~ U(ratio_min, ratio_max),  start ~ U{0, ..., n - length}

of the window's n words, and each word of the crop is dropped with probability `delete`. Crops may overlap, unlike an
inverse cloze task, so exact matches of words are learned beside the topic.

Source: Izacard et al., arXiv 2112.09118, section 3; ratios, chunk and deletion of the released training script (the
crop lengths of its README differ). There a chunk is 256 sub-words of running text; here it is words of one document,
so `least_words` stands against crops that say nothing, which is ours. The paper's loss is InfoNCE against a queue of a
momentum encoder: `negative_queue` with `in_batch: false` is the nearest here. Cost: 120 us a
pair of a paragraph of 120 words.

When: a corpus of paragraphs or longer documents is there, no query, and a backbone that does not retrieve yet (the
nano, which does, lost nDCG by it: docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from pydantic import Field

from mmembed.content import Text
from mmembed.data.pair_base import Pair, PairMaker
from mmembed.data.words import Word, join_words, split_words
from mmembed.errors import ConfigError
from mmembed.registry import Positive

T = TypeVar("T")
Ratio = Annotated[float, Field(gt=0, le=1)]


class RandomCrops(PairMaker):
    """Two independent random crops of one piece of the document (Contriever).

    Args:
        ratio_min, ratio_max: length of a crop as a part of the piece.
        chunk_length: words of the piece.
        delete: probability of each word of a crop to be dropped.
        least_words: a crop has at least so many words (before some are dropped), a document at least twice as many.
    """

    name: ClassVar[str] = "random_crops"

    def __init__(
        self,
        ratio_min: Ratio = 0.05,
        ratio_max: Ratio = 0.5,
        chunk_length: Positive = 256,
        delete: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        least_words: Positive = 4,
    ) -> None:
        if ratio_min > ratio_max:
            raise ConfigError(f"pair_makers.random_crops: ratio_min {ratio_min} is above ratio_max {ratio_max}")
        if chunk_length < 2 * least_words:
            raise ConfigError(
                f"pair_makers.random_crops: chunk_length {chunk_length} holds no two crops of least_words {least_words}"
            )
        self.ratios, self.chunk_length = (ratio_min, ratio_max), chunk_length
        self.delete, self.least_words = delete, least_words

    def lacks(self, text: str) -> tuple[str, str] | None:
        words, least = len(split_words(text)), 2 * self.least_words
        return None if words >= least else (f"{words} words, it takes {least}", "too short")

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        words = split_words(text)
        start = int(generator.integers(max(0, len(words) - self.chunk_length) + 1))
        chunk = words[start : start + self.chunk_length]
        query, positive = (join_words(self._side(chunk, generator)) for _ in range(2))
        return Pair((Text(query),), (Text(positive),))

    def _side(self, chunk: Sequence[Word], generator: np.random.Generator) -> Sequence[Word]:
        ratio, place = generator.uniform(*self.ratios), generator.random()
        return without_some(crop(chunk, ratio, place, self.least_words), self.delete, generator)


def crop(items: Sequence[T], ratio: float, place: float, least: int = 1) -> Sequence[T]:
    """A contiguous part of `ratio` of the length, at least `least`; `place` in [0, 1) says which of all there are.

    >>> crop(range(1, 21), ratio=0.25, place=4 / 16)
    range(5, 10)
    """
    length = max(least, int(len(items) * ratio))
    start = int(place * (len(items) - length + 1))
    return items[start : start + length]


def without_some(words: Sequence[T], probability: float, generator: np.random.Generator) -> Sequence[T]:
    """Each word stays with 1 - probability; one of them where none would."""
    stays = generator.random(len(words)) >= probability
    if not stays.any():
        stays[generator.integers(len(words))] = True
    return [word for word, stay in zip(words, stays, strict=True) if stay]
