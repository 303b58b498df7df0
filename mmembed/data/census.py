"""What the records of a source hold that an objective may need, counted while the source is read.

An objective that compares three views, or distils a teacher's scores, learns nothing of records without them. Counting
kinds of records, not records, tells so before a model is loaded: a source of ten million has some tens of kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mmembed.content import Document, Example
from mmembed.data.pair_base import PairMaker

MOST = 64  # positives that are counted apart


class Held(NamedTuple):
    """What a record holds.

    positives, negatives: how many documents of either kind; MOST stands for more.
    scored_positives, scored_negatives: how many of them have a teacher's `score`; 2 stands for more.
    positives_differ, negatives_differ: whether these scores are more than one number.
    sides_differ: whether a positive and a negative have different ones.
    graded: whether the positives have different relevances.
    """

    positives: int
    negatives: int
    scored_positives: int = 0
    scored_negatives: int = 0
    positives_differ: bool = False
    negatives_differ: bool = False
    sides_differ: bool = False
    graded: bool = False

    def scored(self, positives: int, negatives: int) -> int:
        """How many scored documents a group of so many positives and negatives may have; 2 stands for more."""
        return min(2, min(self.scored_positives, positives) + min(self.scored_negatives, negatives))

    def differ(self, positives: int, negatives: int) -> bool:
        """Whether two scores of such a group may differ."""
        return (
            (self.positives_differ and positives > 1)
            or (self.negatives_differ and negatives > 1)
            or (self.sides_differ and positives > 0 and negatives > 0)
        )


def held(documents: Sequence[Document]) -> Held:
    """What the documents of a record are.

    >>> from mmembed.content import Text
    >>> held([Document((Text("a"),), 1.0, score=0.9), Document((Text("b"),), 0.0, score=0.2)])
    Held(positives=1, negatives=1, scored_positives=1, scored_negatives=1, positives_differ=False, \
negatives_differ=False, sides_differ=True, graded=False)
    """
    positives = [document.score for document in documents if document.relevance > 0]
    negatives = [document.score for document in documents if document.relevance <= 0]
    of_positives = {score for score in positives if score is not None}
    of_negatives = {score for score in negatives if score is not None}
    return Held(
        min(MOST, len(positives)),
        min(MOST, len(negatives)),
        min(2, sum(score is not None for score in positives)),
        min(2, sum(score is not None for score in negatives)),
        len(of_positives) > 1,
        len(of_negatives) > 1,
        bool(of_positives and of_negatives) and len(of_positives | of_negatives) > 1,
        len({document.relevance for document in documents if document.relevance > 0}) > 1,
    )


class Some(NamedTuple):
    """How many records, and `file:line` of the first; empty where there is none."""

    number: int
    first: str


class Census:
    """How many records of a source hold what."""

    def __init__(self, kinds: Iterable[Sequence[Any]] = (), labels: int = 0) -> None:
        self._labels, self._labelled = labels, set[tuple[tuple[str, ...], ...]]()
        self._kinds = {Held(*kind): (count, place, where) for kind, count, place, where in kinds}
        self._records = sum(count for count, _, _ in self._kinds.values())

    @property
    def labels(self) -> int:
        """How many different labels, or sets of them, records have; 2 stands for more."""
        return max(self._labels, len(self._labelled))

    @property
    def records(self) -> int:
        return self._records

    def add(self, example: Example, maker: PairMaker | None = None) -> None:
        """A record; with a maker a raw document, of which it draws a positive, and perhaps a negative."""
        kind = held(example.documents) if maker is None else Held(1, int("negatives" in maker.gives))
        count, place, first = self._kinds.get(kind, (0, self._records, example.where))
        self._kinds[kind] = (count + 1, place, first)
        self._records += 1
        if maker is None and len(self._labelled) < 2:
            self._labelled.add(example.labels)

    def those(self, wanted: Callable[[Held], bool]) -> Some:
        """The records of which `wanted` is true."""
        found = [kept for kind, kept in self._kinds.items() if wanted(kind)]
        first = min(found, key=lambda kept: kept[1], default=(0, 0, ""))
        return Some(sum(count for count, _, _ in found), first[2])

    def as_list(self) -> list[Any]:
        """What the constructor takes, as JSON."""
        return [[[list(kind), *kept] for kind, kept in self._kinds.items()], self.labels]
