"""Balanced data: at most about `cap` items of each topic (MetaCLIP, arXiv 2309.16671).

    matches of an item     the entries of the metadata that its text holds, as whole words in a row
    p of an entry          min(1, cap / how many items match it)
    an item is kept        if for one of its entries a draw succeeds: with probability 1 - product of (1 - p)

Items that match nothing are left out, as in the paper. MetaCLIP has 500,000 entries (WordNet, words and bigrams and
titles of Wikipedia) and cap 20,000 for 400 M pairs. Here entries come from a file or from the data: its words and
bigrams (of words with a normalised pointwise mutual information of 0.5; MetaCLIP's bound of 30 is of all Wikipedia), or
its `labels`. Without a cap, it is set as MetaCLIP 2 (arXiv 2507.22062) does for further languages: entries with at most
`cap` matches have the share `tail` of all matches. Texts are lower-cased, without punctuation; of scripts without
blanks words are pairs of characters.

Cost: three passes over the items, a fourth where entries come of the data; 0.5 ms a text of 120 words a pass; 100 bytes
of memory an entry, and a distinct word or bigram.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.sides import Side, check_sides, matched_texts
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.data.words import search_words
from mmembed.errors import ConfigError
from mmembed.registry import Above0, Positive

TOGETHER = 0.5  # normalised pointwise mutual information of a bigram's words: 0 by chance, 1 never apart
Entry = tuple[str, ...]  # its words
Matches = Callable[[Item], list[Entry]]


class Balanced(SetStage):
    """Samples items so that no topic has many more than others.

    Args:
        metadata: a file with an entry a line, or a JSON list.
        entries: where entries come from without it.
        least: items that a word or bigram stands in to be an entry.
        sides: whose texts are matched; of documents of records the positives'.
        cap: matches of an entry from which it is sampled; None sets it by `tail`.
        tail: share of all matches, of entries with at most `cap`.
        unmatched: what becomes of items that match nothing.
    """

    name: ClassVar[str] = "balanced"

    def __init__(
        self,
        below_root: Callable[[str], Path],
        metadata: str | None = None,
        entries: Literal["words", "labels"] | None = None,
        least: Positive | None = None,
        sides: Sequence[Side] | None = None,
        cap: Positive | None = None,
        tail: Above0 | None = None,
        unmatched: Literal["drop", "keep"] = "drop",
    ) -> None:
        if cap is not None and tail is not None:
            raise ConfigError(f"{self.name}: cap and tail both say how many; give one")
        if tail is not None and tail > 1:
            raise ConfigError(f"{self.name}.tail: found {tail}; give a share, at most 1")
        if metadata is not None and (entries is not None or least is not None):
            raise ConfigError(
                f"{self.name}: metadata is a file, and 'entries' and 'least' make them of the data; keep one"
            )
        if entries == "labels" and (least is not None or sides is not None):
            raise ConfigError(f"{self.name}: labels are no texts; remove 'least' and 'sides'")
        self.metadata = None if metadata is None else below_root(metadata)
        if self.metadata is not None and not self.metadata.is_file():
            raise ConfigError(f"{self.name}.metadata: there is no {self.metadata}; check the path, or set root")
        self.entries, self.least, self.sides = entries or "words", least or 5, sides
        self.cap, self.tail, self.unmatched = cap, tail or 0.06, unmatched

    def gives(self, kind: Kind) -> Kind:
        check_sides(self.name, kind, self.sides or ())
        if self.entries == "labels" and kind != "records":
            raise ConfigError(f"{self.name}: labels are of records, and these are {kind}; set entries: words")
        return kind

    def fingerprint(self) -> Any:
        return None if self.metadata is None else self.metadata.read_text(encoding="utf-8")

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        matched = self._matches(items)
        counts: Counter[Entry] = Counter()
        for item in items:
            counts.update(matched(item))
        cap = self.cap or cap_of_tail(np.array(list(counts.values()), np.int64), self.tail)
        context.notes["entries that are matched"] = len(counts)
        context.notes["cap"] = cap
        context.notes["entries above the cap"] = sum(count > cap for count in counts.values())
        for item in items:
            found = matched(item)
            if not found:
                yield item if self.unmatched == "keep" else Dropped(item, "matches no entry")
                continue
            chance = 1 - math.prod(1 - min(1.0, cap / counts[entry]) for entry in found)
            if context.random(item["id"]).random() < chance:
                yield item
            else:
                rarest = min(found, key=lambda entry: (counts[entry], entry))
                yield Dropped(
                    item, "above the cap", f"'{' '.join(rarest)}' of {counts[rarest]:,}, kept with {chance:.3f}"
                )

    def _matches(self, items: Items) -> Matches:
        if self.entries == "labels":
            return _labels
        return _matcher(self._made(items) if self.metadata is None else self._read(), self._texts)

    def _texts(self, item: Item) -> list[str]:
        return matched_texts(item, self.sides or ("query", "document"))

    def _read(self) -> set[Entry]:
        assert self.metadata is not None, "it is read where there is one"
        whole = self.metadata.read_text(encoding="utf-8")
        try:
            lines = json.loads(whole) if self.metadata.suffix == ".json" else whole.splitlines()
        except ValueError as error:
            raise ConfigError(f"{self.metadata}: not JSON ({error})") from None
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"{self.metadata}: is no list of texts; write an entry a line, or a JSON list of them")
        entries = {tuple(search_words(line)) for line in lines} - {()}
        if not entries:
            raise ConfigError(f"{self.metadata}: has no entry with a word")
        return entries

    def _made(self, items: Items) -> set[Entry]:
        """Words and bigrams that stand in `least` items; bigrams whose words belong together."""
        words: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        for item in items:
            texts = [search_words(text) for text in self._texts(item)]
            words.update({word for text in texts for word in text})
            pairs.update({pair for text in texts for pair in pairwise(text)})
        frequent: set[Entry] = {(word,) for word, count in words.items() if count >= self.least}
        return frequent | {
            pair for pair, count in pairs.items()
            if count >= self.least and _together(count, words[pair[0]] * words[pair[1]], len(items)) >= TOGETHER
        }  # fmt: skip


def cap_of_tail(counts: NDArray[np.int64], tail: float) -> int:
    """The count of an entry such that entries with at most as many have the share of all that is next to `tail`."""
    rising = np.sort(counts)
    if not len(rising):
        return 1
    shares = np.cumsum(rising) / rising.sum()
    return int(rising[int(np.abs(shares - tail).argmin())])


def _matcher(entries: Collection[Entry], texts: Callable[[Item], list[str]]) -> Matches:
    """What finds the entries whose words stand in an item's texts in a row."""
    lengths = sorted({len(entry) for entry in entries})

    def matched(item: Item) -> list[Entry]:
        found: dict[Entry, None] = {}
        for text in texts(item):
            words = search_words(text)
            for n in lengths:
                runs = (tuple(words[at : at + n]) for at in range(len(words) - n + 1))
                found.update(dict.fromkeys(run for run in runs if run in entries))
        return list(found)

    return matched


def _labels(item: Item) -> list[tuple[str, ...]]:
    """An item's labels, each the path in its tree."""
    paths = ((label,) if isinstance(label, str) else tuple(label) for label in item.get("labels", ()))
    return list(dict.fromkeys(paths))


def _together(count: int, product: int, total: int) -> float:
    """Normalised pointwise mutual information of two words that stand `count` times together in `total` items."""
    if count >= total:
        return 0.0  # in all items: nothing tells the two apart
    return math.log(count * total / product) / -math.log(count / total)
