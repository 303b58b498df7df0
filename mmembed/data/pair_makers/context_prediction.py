"""Contrastive context prediction: a piece of a document and a neighbour of it.

A document is a sequence of sentences. The centre is `sentences` of them in a row, at a random place; the context is as
many, without overlap, at most `window` sentences away from it on either side, each place equally likely:

query = x_i ... x_{i+n-1},  positive = x_j ... x_{j+n-1},  i ~ U,  j ~ U{ j: n <= |i - j| < n + w }

for the sentences x of a document, n of them a side, and a window of w. Sentences that stand together are about the same
thing and share few words, so a model has to go by meaning.

Source: Wu et al., "Unsupervised Context Aware Sentence Representation Pretraining for Multi-lingual Dense Retrieval",
arXiv 2206.03281. There both directions are learned (`objective.symmetric: true`), negatives come from a memory bank for
each language (a source for each language and `negative_queue` are the nearest here, a batch being of one source), and
an asymmetric batch normalisation against leaks stands between vectors and loss, which is not offered. The window's size
is ours: the paper's could not be read. Cost: 150 us a pair of a paragraph of 120 words.

When: documents are prose of several sentences, and topic matters more than equal words.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mmembed.content import Text
from mmembed.data.pair_base import Pair, PairMaker
from mmembed.data.words import split_sentences
from mmembed.registry import Positive


class ContextPrediction(PairMaker):
    """A sentence, and a sentence near it in the same document (CCP).

    Args:
        window: how far away the context may be, in sentences.
        sentences: in a row, of either side.
    """

    name: ClassVar[str] = "context_prediction"

    def __init__(self, window: Positive = 2, sentences: Positive = 1) -> None:
        self.window, self.sentences = window, sentences

    def lacks(self, text: str) -> tuple[str, str] | None:
        found, least = len(split_sentences(text)), 2 * self.sentences
        return None if found >= least else (f"{found} sentences, it takes {least}", "too short")

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        sentences = split_sentences(text)
        places = len(sentences) - self.sentences + 1
        centres = [place for place in range(places) if neighbours(place, places, self.sentences, self.window)]
        centre = int(generator.choice(centres))
        context = int(generator.choice(neighbours(centre, places, self.sentences, self.window)))
        query, positive = (" ".join(sentences[at : at + self.sentences]) for at in (centre, context))
        return Pair((Text(query),), (Text(positive),))


def neighbours(centre: int, places: int, size: int, window: int) -> list[int]:
    """Places of runs of `size` sentences at most `window` sentences from the run at `centre`, none shared with it.

    >>> neighbours(3, places=8, size=1, window=2)
    [1, 2, 4, 5]
    >>> neighbours(0, places=7, size=2, window=1)
    [2]
    """
    return [place for place in range(places) if size <= abs(place - centre) < size + window]
