"""Records from which the nano learns to judge pairs, from what a glance tells to what needs reading.

A model of this size that is asked at once which of eight paragraphs answers a question stays at chance for hundreds of
steps. Whether a document repeats the query it learns in forty, and what does this (attention from a document's tokens
to the same ones of the query) the next stage needs, too: documents that have the query somewhere in them, that are
about what it is about, and that answer it.

All of it comes from `data.train_passages` and `data.train_pairs`: train splits, and none of the demo's queries.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmembed.content import Document, Example, Text
from recipes.nano.data import Pair, Passage

SHORTEST_QUERY = 20  # characters
COPIED = (30, 130)  # characters of a sentence that is query and document at once
KEYWORDS = (3, 8)  # words of a sentence that are asked
DOCUMENTS = 8  # of a query, one of them relevant


@dataclass(frozen=True)
class Stage:
    """A run of `recipes/train_reranker.py` that goes on from the one before.

    Attributes:
        about: a query's documents, in words.
        steps: optimizer steps.
        records: draws them without end.
        settings: of the config, beside those that all stages have.
    """

    name: str
    about: str
    steps: int
    records: Callable[[random.Random], Iterator[Example]]
    settings: dict[str, Any] = field(default_factory=dict)


def copies(passages: Sequence[Passage], draw: random.Random) -> Iterator[Example]:
    """A sentence, and eight of which one is the same."""
    least, most = COPIED
    sentences = sorted({s for passage in passages for s in passage.sentences if least < len(s) < most})
    while True:
        same, *others = draw.sample(sentences, DOCUMENTS)
        yield _example(same, same, others)


def cloze(
    passages: Sequence[Passage], draw: random.Random, *, characters: int, kept: float, near: float
) -> Iterator[Example]:
    """A sentence, and parts of eight paragraphs of which one is its own.

    Args:
        characters: a paragraph's sentences around one are added until there are so many.
        kept: how often the paragraph still has the sentence.
        near: share of the other paragraphs that are from the same article or section.
    """
    for sentence, own, others in _cut(passages, draw, characters=characters, kept=kept, near=near):
        yield _example(sentence, own, others)


def keywords(passages: Sequence[Passage], draw: random.Random, *, characters: int, near: float) -> Iterator[Example]:
    """Some words of a sentence, in their order, and parts of eight paragraphs of which one holds the sentence.

    It is most of what questions have in common with their answers: few words, of which rare ones matter. Arguments as
    of `cloze`.
    """
    least, most = KEYWORDS
    for sentence, own, others in _cut(passages, draw, characters=characters, kept=1.0, near=near):
        words = sentence.split()
        if len(words) > most:
            asked = sorted(draw.sample(range(len(words)), draw.randint(least, most)))
            yield _example(" ".join(words[at] for at in asked), own, others)


def questions(pairs: Sequence[Pair], draw: random.Random) -> Iterator[Example]:
    """A query, a document that answers it, and others of the same set, drawn at random."""
    of_source: dict[str, list[Pair]] = {}
    relevant: dict[tuple[str, str], set[str]] = {}
    for pair in pairs:
        of_source.setdefault(pair.source, []).append(pair)
        relevant.setdefault((pair.source, pair.query), set()).add(pair.document)
    while True:
        pair = draw.choice(pairs)
        answers = relevant[pair.source, pair.query]
        others = [other.document for other in draw.choices(of_source[pair.source], k=2 * DOCUMENTS)]
        others = [document for document in others if document not in answers][: DOCUMENTS - 1]
        if len(others) == DOCUMENTS - 1:
            yield _example(pair.query, pair.document, others)


def mixed(parts: Sequence[tuple[float, Iterator[Example]]], draw: random.Random) -> Iterator[Example]:
    """Examples of all parts, each (its weight, its examples)."""
    weights, examples = zip(*parts, strict=True)
    while True:
        yield next(*draw.choices(examples, weights))


def _cut(
    passages: Sequence[Passage], draw: random.Random, *, characters: int, kept: float, near: float
) -> Iterator[tuple[str, str, list[str]]]:
    """A sentence, the part of a paragraph around it, and parts of seven others. Arguments as of `cloze`."""
    groups: dict[str, list[Passage]] = {}
    for passage in passages:
        groups.setdefault(passage.group, []).append(passage)
    while True:
        passage = draw.choice(passages)
        asked = draw.randrange(len(passage.sentences))
        if len(passage.sentences[asked]) < SHORTEST_QUERY:
            continue
        neighbours = groups[passage.group] if len(groups[passage.group]) >= DOCUMENTS else passages
        others: list[str] = []
        while len(others) < DOCUMENTS - 1:
            other = draw.choice(neighbours if draw.random() < near else passages)
            if other is not passage:
                others.append(_part(other.sentences, draw.randrange(len(other.sentences)), True, characters, draw))
        own = _part(passage.sentences, asked, draw.random() < kept, characters, draw)
        if own not in others:
            yield passage.sentences[asked], own, others


def _part(sentences: Sequence[str], at: int, kept: bool, characters: int, draw: random.Random) -> str:
    """Sentences around one of them, with it or without it."""
    first, behind = at, at + 1
    chosen = [sentences[at]] if kept else []
    while sum(map(len, chosen)) < characters and (first > 0 or behind < len(sentences)):
        if first > 0 and (behind == len(sentences) or draw.random() < 0.5):
            first -= 1
            chosen.insert(0, sentences[first])
        else:
            chosen.append(sentences[behind])
            behind += 1
    return " ".join(chosen)


def _example(query: str, relevant: str, others: Sequence[str]) -> Example:
    documents = [Document((Text(relevant),)), *(Document((Text(other),), relevance=0.0) for other in others)]
    return Example((Text(query),), tuple(documents))
