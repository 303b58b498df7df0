"""BM25, Lucene's formula: matches words, needs no model. Texts alone.

    s(q, d) = sum over the words w of q of idf(w) f / (f + k1 (1 - b + b |d| / mean |d|)),  f = how often w is in d
    idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2)),  n = documents with w

Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009). The negatives of DPR (arXiv 2004.04906). Cost:
the postings of a query's words, and one array of N scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Item, Lexical, text_alone
from mmembed.data.words import search_words
from mmembed.registry import Above0, Weight
from mmembed.search import Hits


class Bm25(Lexical):
    """BM25.

    Args:
        k1: how soon more of one word count no more.
        b: how much long documents lose, 0 to 1.
    """

    name: ClassVar[str] = "bm25"

    def __init__(self, k1: Above0 = 1.2, b: Weight = 0.75) -> None:
        self.k1, self.b = k1, b

    def fingerprint(self) -> Any:
        return [self.name, self.k1, self.b]

    def index(self, documents: Sequence[Item]) -> None:
        lengths, found = np.empty(len(documents)), list[tuple[int, int, int]]()
        self._words: dict[str, int] = {}
        for row, document in enumerate(documents):
            words = search_words(text_alone(document, self.name))
            lengths[row] = len(words)
            found += [
                (self._words.setdefault(word, len(self._words)), row, count) for word, count in Counter(words).items()
            ]
        table = np.array(found, np.int64).reshape(-1, 3)
        table = table[np.argsort(table[:, 0], kind="stable")]
        self._starts = np.searchsorted(table[:, 0], np.arange(len(self._words) + 1))
        with_word = np.diff(self._starts)
        idf = np.log(1 + (len(documents) - with_word + 0.5) / (with_word + 0.5))
        self._rows, counts = table[:, 1], table[:, 2].astype(np.float64)
        spread = self.k1 * (1 - self.b + self.b * lengths / max(lengths.mean(), 1e-9))
        self._weights = idf[table[:, 0]] * counts / (counts + spread[self._rows])
        self._count = len(documents)

    def search(self, queries: Sequence[Item], k: int, rows: NDArray[np.int64]) -> tuple[Hits, NDArray[np.float32]]:
        hits = Hits(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
        own = np.full(rows.shape, np.nan, np.float32)
        for number, query in enumerate(queries):
            scores = self.scores(query)
            best = _best(scores, min(k, self._count))
            best = best[scores[best] > 0]  # the others share no word
            hits.scores[number, : len(best)], hits.indices[number, : len(best)] = scores[best], best
            there = rows[number] >= 0
            own[number, there] = scores[rows[number][there]]
        return hits, own

    def scores(self, query: Item) -> NDArray[np.float32]:
        """(N,) of one query."""
        scores = np.zeros(self._count)
        for word, times in Counter(search_words(text_alone(query, self.name))).items():
            if word in self._words:
                at = slice(*self._starts[self._words[word] : self._words[word] + 2])
                scores[self._rows[at]] += times * self._weights[at]
        return scores.astype(np.float32)


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k largest, ties by the smaller row."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    rows = np.flatnonzero(scores >= least)
    return rows[np.lexsort((rows, -scores[rows]))][:k]
