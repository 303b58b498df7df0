"""PROP's pairs: of two bags of words that a document could have been asked for by, the likelier one.

The document's unigram model, smoothed by the collection's (Dirichlet prior):

P(w|D) = ( tf(w, D) + mu P(w|C) ) / ( |D| + mu )

Two sets of the same number of words, Poisson(length) but not 0, are sampled from it, frequent words being passed over
with probability 1 - k(w), k = min(1, sqrt(t/f) + t/f), f their part of all words. Of the two the one with the larger
sum of log P(w|D) is the positive and the other the negative; where both are equally likely they are drawn again.

The document is the query of the pair, since the two sets compete for it; `objective.symmetric: true` also lets the
likelier set find its document among those of the batch, which is what a search does. The paper's model reads document
and set together, with a hinge of margin 1 between the two scores beside a masked language model; with vectors, InfoNCE
takes the hinge's place and other documents' sets are negatives too.

Source: Ma et al., arXiv 2010.10137; the released code for what the equation leaves open: mu is the mean length of a
document, P(w|C) goes by how many documents have the word, t = 1e-4, length 3, words of less than 10 occurrences do not
count. It draws from 500 words a document and may stem; here it is the whole vocabulary, unstemmed. Costs: 350 us a pair
of a paragraph of 120 words; a count of all words while the source is read, 150 bytes for each distinct one, and 150
bytes on disk for each that is kept, mapped by all processes.

When: queries are a few keywords, and the whole corpus is at hand before training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from mmembed.content import Text
from mmembed.data.pair_base import Pair, PairMaker
from mmembed.data.words import terms
from mmembed.errors import ConfigError
from mmembed.registry import Positive

_LETTERS = 30  # of a word; longer ones are no words
_TRIES = 50  # drawings until two sets differ in likelihood
_ARRAYS = ("words", "probability", "cumulative", "kept", "mean_length")


class RepresentativeWords(PairMaker):
    """The document, and two bags of words from its language model: the likelier is the positive (PROP).

    Args:
        length: mean of the Poisson distribution of the number of words.
        mu: weight of the collection in the language model; the mean length of a document if None.
        min_count: words of fewer occurrences in all documents are left out.
        subsampling: t; frequent words are passed over. None: none is.
    """

    name: ClassVar[str] = "representative_words"
    gives: ClassVar[frozenset[str]] = frozenset({"negatives"})
    learns: ClassVar[bool] = True

    def __init__(
        self,
        length: Annotated[float, Field(gt=0)] = 3.0,
        mu: Annotated[float, Field(gt=0)] | None = None,
        min_count: Positive = 10,
        subsampling: Annotated[float, Field(gt=0)] | None = 1e-4,
    ) -> None:
        self.length, self.mu, self.min_count, self.subsampling = length, mu, min_count, subsampling
        self._counts: Counter[str] = Counter()
        self._documents: Counter[str] = Counter()  # that have the word
        self._read, self._folder = 0, Path()
        self._arrays: dict[str, np.ndarray] = {}

    def lacks(self, text: str) -> tuple[str, str] | None:
        return None if terms(text) else ("no word", "too short")

    def count(self, text: str) -> None:
        found = terms(text)
        self._counts.update(found)
        self._documents.update(set(found))
        self._read += 1

    def keep(self, folder: Path) -> None:
        for name, array in collection(
            self._counts, self._documents, self._read, self.min_count, self.subsampling
        ).items():
            np.save(folder / f"{name}.npy", array)
        self._counts, self._documents = Counter(), Counter()

    def use(self, folder: Path) -> None:
        self._folder = folder
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # mapped anew, not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._folder != Path():
            self.use(self._folder)

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        places = self._places(terms(text))
        size = 0
        while size == 0:
            size = int(generator.poisson(self.length))
        for _ in range(_TRIES):
            sets = [self._sample(places, size, generator) for _ in range(2)]
            sums = [math.fsum(self.log_likelihoods(places, one)) for one in sets]
            if sums[0] != sums[1]:
                break
        likelier = int(sums[1] > sums[0])
        positive, negative = (self._text(sets[which]) for which in (likelier, 1 - likelier))
        negatives = ((Text(negative),),) if sums[0] != sums[1] else ()
        return Pair((Text(text),), (Text(positive),), negatives)

    def log_likelihoods(self, document: Sequence[int], words: Sequence[int]) -> list[float]:
        """log P(w|D) of each of some words.

        Args:
            document, words: places in the vocabulary; of the document with repetitions.
        """
        counts, mu = Counter(document), self._mu
        probability = self._arrays["probability"]
        return [math.log((counts[word] + mu * float(probability[word])) / (len(document) + mu)) for word in words]

    @property
    def _mu(self) -> float:
        return float(self._arrays["mean_length"]) if self.mu is None else self.mu

    def _sample(self, document: Sequence[int], size: int, generator: np.random.Generator) -> list[int]:
        """Words from P(w|D), an occurrence in the document or one of the collection, passed over by 1 - k."""
        cumulative, kept = self._arrays["cumulative"], self._arrays["kept"]
        found: list[int] = []
        own = len(document) / (len(document) + self._mu)
        while len(found) < size:
            mine, where, stays = generator.random(3).tolist()
            if mine < own:
                word = document[int(where * len(document))]
            else:
                word = int(np.searchsorted(cumulative, where, side="right"))
            if stays < kept[word]:
                found.append(word)
        return found

    def _places(self, words: Sequence[str]) -> list[int]:
        """Where words stand in the vocabulary; those that do not are left out."""
        vocabulary = self._arrays["words"]
        at = np.searchsorted(vocabulary, np.array([word[: _LETTERS + 1] for word in words]))
        at = at.clip(max=len(vocabulary) - 1)
        return [int(place) for place, word in zip(at, words, strict=True) if vocabulary[place] == word]

    def _text(self, words: Sequence[int]) -> str:
        return " ".join(str(self._arrays["words"][word]) for word in words)


def collection(
    counts: Mapping[str, int],
    documents: Mapping[str, int],
    read: int,
    min_count: int,
    subsampling: float | None,
) -> dict[str, np.ndarray]:
    """The collection's model: V words in order, P(w|C), its running sum, k(w), and the mean length of a document.

    >>> found = collection({"bus": 3, "red": 1}, {"bus": 2, "red": 1}, read=2, min_count=1, subsampling=None)
    >>> found["words"].tolist(), found["probability"].round(2).tolist(), float(found["mean_length"])
    (['bus', 'red'], [0.67, 0.33], 2.0)

    Raises:
        ConfigError: fewer than two words are left.
    """
    words = sorted(word for word, count in counts.items() if count >= min_count and len(word) <= _LETTERS)
    if len(words) < 2:
        raise ConfigError(
            f"pair_makers.representative_words: {len(words)} of {len(counts)} words occur {min_count} times in all "
            f"documents; lower min_count, or give more documents"
        )
    total = sum(counts.values())
    share = np.array([documents[word] for word in words], dtype=np.float64)  # (V,)
    probability = share / share.sum()
    frequency = np.array([counts[word] for word in words], dtype=np.float64) / total
    kept = np.ones(len(words)) if subsampling is None else np.sqrt(subsampling / frequency) + subsampling / frequency
    cumulative = probability.cumsum()
    cumulative[-1] = 1.0  # rounding leaves no gap behind the last word
    return {
        "words": np.array(words, dtype=f"<U{_LETTERS}"),
        "probability": probability,
        "cumulative": cumulative,
        "kept": kept.clip(max=1.0),
        "mean_length": np.array(total / read),
    }
