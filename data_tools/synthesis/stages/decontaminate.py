"""Nothing of an evaluation set in what is trained on: exact texts, runs of words, and pictures.

    exact     the same words in the same order, without case and punctuation, of any length
    13-gram   a run of 13 words that an evaluation text holds (GPT-3, arXiv 2005.14165, appendix C)
    whole     an evaluation text of 8 to 12 words stands in a text (GPT-3's least n is 8; below that, exact alone)
    picture   the same file, or one that looks the same (`data_tools.near_duplicates`)

Both sides of an item are compared with both sides of each set: its queries, and the documents that are relevant to
them. GPT-3 chose one n for a set by its lengths and cut its books around a match; here each text has its own n, and
what matches goes whole: a document out of its record, an item where it is the query or the last positive. Runs are
compared by hashes of 64 bits. Thirteen words of a quotation that two texts share match as well: see what is left out.

Cost: items are streamed, 1 ms a text of 120 words; 12 bytes of memory a word of the sets; where sets have pictures,
one pass more, 4 ms and 250 bytes a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.near_duplicates import picture_matches
from data_tools.synthesis.evaluation_sets import EvaluationSet, Opened
from data_tools.synthesis.sides import Fault, Side, contents_of, sifted
from data_tools.synthesis.stages import Context, Dropped, Item, Items, SetStage, Trimmed
from data_tools.synthesis.templates import pictures_of, text_of
from mmembed.content import Image
from mmembed.data.words import search_words
from mmembed.errors import ConfigError
from mmembed.registry import Count, Positive

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: powers of it keep all bits
_CACHED_WORDS = 1 << 18


class Owner(NamedTuple):
    """Where an evaluation text or picture stands."""

    set: str
    id: str


class Decontaminate(SetStage):
    """Leaves out what stands in evaluation sets.

    Args:
        against: paths of the sets, or {path, split, name}: BEIR folders, files of records or contents, folders of
            pictures.
        sides: of the sets: queries, relevant documents, or both.
        ngram: words of a run; None compares whole texts alone.
        shortest: words of an evaluation text that is looked for within texts.
        distance: how many of the 256 bits of two pictures' hashes may differ; None takes equal files alone.
    """

    name: ClassVar[str] = "decontaminate"

    def __init__(
        self,
        below_root: Callable[[str], Path],
        against: Sequence[str | EvaluationSet],
        sides: Sequence[Side] = ("query", "document"),
        ngram: Positive | None = 13,
        shortest: Positive = 8,
        distance: Count | None = 8,
    ) -> None:
        if not against or not sides:
            raise ConfigError(f"{self.name}: compares with nothing; give against: [path] and sides")
        if ngram is not None and shortest > ngram:
            raise ConfigError(f"{self.name}: shortest {shortest} is above ngram {ngram}; lower it")
        self.sets = [Opened(self.name, one, below_root) for one in against]
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise ConfigError(f"{self.name}.against: two sets of one name ({', '.join(names)}); give each a 'name'")
        self.sides, self.distance = frozenset(sides), distance
        self.lengths = range(0) if ngram is None else range(shortest, ngram + 1)

    def fingerprint(self) -> Any:
        return [one.stamps() for one in self.sets]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        texts, pictures = self._read(context)
        alike = self._looking_alike(items, pictures, context)
        met: set[Owner] = set()

        def verdict(side: Side, content: Any) -> Fault | None:
            found = texts.match(text_of(content)) or next(
                (alike[key] for key in self._digests(content, context) if key in alike), None
            )
            if found is None:
                return None
            rule, owner, shown = found
            met.add(owner)
            return Fault(f"{rule} of {owner.set}", f"'{owner.id}'{shown and f': {shown}'}")

        for item in items:
            yield from sifted(item, verdict)
        for owner in met:
            context.notes[f"entries of {owner.set} that were met"] += 1

    def _read(self, context: Context) -> tuple[_Texts, list[tuple[Owner, str]]]:
        """The texts of all sets, and the sources of their pictures."""
        texts, pictures = _Texts(self.lengths), list[tuple[Owner, str]]()
        for one in self.sets:
            for entry in one:
                if entry.side is not None and entry.side not in self.sides:
                    continue
                owner = Owner(one.name, entry.id)
                texts.add(text_of(entry.content), owner)
                pictures += [(owner, source) for source in pictures_of(entry.content)]
        texts.close()
        return texts, pictures

    def _looking_alike(
        self, items: Items, pictures: list[tuple[Owner, str]], context: Context
    ) -> dict[bytes, tuple[str, Owner, str]]:
        """Digest of a picture that stands in a set -> what it matches."""
        if not pictures:
            return {}
        stores = {one.name: one.media(context.media.limits) for one in self.sets}
        equal: dict[bytes, tuple[str, Owner, str]] = {}
        for owner, source in pictures:
            equal.setdefault(stores[owner.set].digest(Image(source)), ("picture", owner, ""))
        if self.distance is None:
            return equal
        sources: dict[bytes, str] = {}  # of the items
        for item in items:
            for content in contents_of(item):
                for source in pictures_of(content):
                    sources.setdefault(context.media.digest(Image(source)), source)
        matches = picture_matches(
            (context.media.open(Image(source)) for source in sources.values()),
            (stores[owner.set].open(Image(source)) for owner, source in pictures),
            self.distance,
        )
        keys = list(sources)
        alike = {keys[place]: ("similar picture", pictures[other][0], "") for place, other in matches.items()}
        return {**alike, **equal}

    @staticmethod
    def _digests(content: Any, context: Context) -> Iterator[bytes]:
        return (context.media.digest(Image(source)) for source in pictures_of(content))


class _Texts:
    """The texts of evaluation sets, to be found again whole and in parts.

    Args:
        lengths: of runs of words: the longest is looked for everywhere in the texts, the others stand for whole texts.
    """

    def __init__(self, lengths: range) -> None:
        self.lengths, self.owners = lengths, list[Owner]()
        self._whole: dict[bytes, int] = {}
        self._parts: dict[int, list[tuple[NDArray[np.uint64], int]]] = {n: [] for n in lengths}
        self._runs: dict[int, tuple[NDArray[np.uint64], NDArray[np.int32]]] = {}

    def add(self, text: str, owner: Owner) -> None:
        if not text:
            return
        words, number = search_words(text), len(self.owners)
        self.owners.append(owner)
        self._whole.setdefault(_plain(words, text), number)
        n = min(len(words), self.lengths[-1]) if self.lengths else 0
        if n in self._parts:
            self._parts[n].append((_runs(_hashes(words), n), number))

    def close(self) -> None:
        """To be called when all are there."""
        for n, parts in self._parts.items():
            if parts:
                owners = np.concatenate([np.full(len(runs), number, np.int32) for runs, number in parts])
                runs, first = np.unique(np.concatenate([runs for runs, _ in parts]), return_index=True)
                self._runs[n] = runs, owners[first]
        self._parts.clear()

    def match(self, text: str) -> tuple[str, Owner, str] | None:
        """Rule, evaluation text and the common words, where a text has any."""
        if not text:
            return None
        words = search_words(text)
        number = self._whole.get(_plain(words, text))
        if number is not None:
            return "exact text", self.owners[number], text[:100]
        hashes = _hashes(words) if self._runs else np.empty(0, np.uint64)
        for n, (known, owners) in sorted(self._runs.items(), reverse=True):
            runs = _runs(hashes, n)
            places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            hits = np.flatnonzero(known[places] == runs)
            if len(hits):
                rule = f"{n}-gram" if n == self.lengths[-1] else "whole text"
                return rule, self.owners[owners[places[hits[0]]]], " ".join(words[hits[0] : hits[0] + n])
        return None


def _plain(words: list[str], text: str) -> bytes:
    """What texts of the same words share; of a text without words, itself."""
    return blake2b((" ".join(words) or text.strip()).encode("utf-8", "replace"), digest_size=16).digest()


@lru_cache(_CACHED_WORDS)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _hashes(words: list[str]) -> NDArray[np.uint64]:
    """(T,) of the words."""
    return np.array([_hash(word) for word in words], np.uint64)


def _runs(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """(T - n + 1,) polynomial hashes, modulo 2^64, of all runs of n words."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for at in range(n):
        found = found * _BASE + hashes[at : at + count]
    return found
