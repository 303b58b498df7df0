"""One item of each group of near copies: MinHash over texts, perceptual hashes over pictures.

`data_tools.near_duplicates` finds the groups, which do not chain: each member is near the first.
Two contents are near copies where their texts are (or neither has one), and their pictures are, one by one. Records are
compared by their query, their positives, or both. Documents *of* a record are compared as well: a negative that is
nearly a positive is a wrong negative, and two that are nearly the same teach one thing twice.

Cost: two passes over the items and a third to write; 0.5 ms and 700 bytes a distinct text of 120 words, 4 ms a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.files import digest
from data_tools.near_duplicates import picture_groups, text_groups
from data_tools.synthesis.sides import Fault, contents_of, is_positive, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from data_tools.synthesis.templates import pictures_of, text_of
from mmembed.content import Image
from mmembed.errors import ConfigError
from mmembed.media import MediaStore
from mmembed.registry import Above0, Count

MOST_DISTANCE = 64  # of the 256 bits of two hashes


class NearDuplicates(SetStage):
    """Keeps one of the items that are nearly the same.

    Args:
        by: what makes two records copies: the query, the positives, or both (`pair`); `nothing` looks within records
            only. Of queries and documents it is their content.
        keep: the first of a group, or the best: the highest score of a positive, or of a document.
        within: take documents of a record out that are near copies of another of its documents, positives first.
        threshold: Jaccard similarity of the texts' runs of three words.
        distance: how many of the 256 bits of two pictures' hashes may differ.
    """

    name: ClassVar[str] = "near_duplicates"

    def __init__(
        self,
        by: Literal["query", "positives", "pair", "nothing"] | None = None,
        keep: Literal["first", "best"] = "first",
        within: bool | None = None,
        threshold: Above0 = 0.8,
        distance: Count = 8,
    ) -> None:
        if threshold > 1 or distance > MOST_DISTANCE:
            raise ConfigError(
                f"{self.name}: found threshold {threshold}, distance {distance}; give at most 1 and {MOST_DISTANCE}"
            )
        if by == "nothing" and within is False:
            raise ConfigError(f"{self.name}: looks nowhere; set by, or within: true")
        self.by, self.keep, self.within = by, keep, within
        self.threshold, self.distance = threshold, distance

    def gives(self, kind: Kind) -> Kind:
        if kind != "records" and (self.by is not None or self.within is not None):
            raise ConfigError(f"{self.name}: 'by' and 'within' are of records, and these are {kind}; remove them")
        return kind

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        looks = _Looks(items, context.media, self.threshold, self.distance)
        numbers: dict[Any, int] = {}  # what near copies share -> the number of their group
        group_of = np.full(len(items), -1, np.int64)
        best: list[tuple[float, int, str]] = []  # of each group: score, place and id of the item that is kept
        for place, item in enumerate(items if self.by != "nothing" else ()):
            number = numbers.setdefault(self._key(item, looks), len(best))
            score = _score(item) if self.keep == "best" else 0.0
            if number == len(best):
                best.append((score, place, item["id"]))
            elif score > best[number][0]:
                best[number] = (score, place, item["id"])
            group_of[place] = number
        for place, item in enumerate(items):
            number = int(group_of[place])
            if number >= 0 and best[number][1] != place:
                yield Dropped(item, "near duplicate", f"of '{best[number][2]}'")
            elif "documents" in item and self.within is not False:
                yield from without(item, _copies(item["documents"], looks))
            else:
                yield item

    def _key(self, item: Item, looks: _Looks) -> Any:
        """What near copies of an item share."""
        if "content" in item:
            return looks.of(item["content"])
        query = (looks.of(item["query"]), item.get("instruction"))
        if "documents" not in item or self.by in (None, "query"):
            return query
        positives = tuple(looks.of(one["content"]) for one in item["documents"] if is_positive(one))
        return positives if self.by == "positives" else (query, positives)


class _Looks:
    """Numbers of texts and pictures, which near copies share."""

    def __init__(self, items: Items, media: MediaStore, threshold: float, distance: int) -> None:
        self.media, self._texts, self._pictures = media, dict[bytes, int](), dict[bytes, int]()
        texts = text_groups(self._distinct_texts(items), threshold)
        pictures = picture_groups(self._distinct_pictures(items), distance)
        self._text_numbers = _joined(len(self._texts), texts)
        self._picture_numbers = _joined(len(self._pictures), pictures)

    def of(self, content: Any) -> tuple[int, ...]:
        """Of a content: the number of its text (-1 without one), and those of its pictures."""
        text = text_of(content)
        number = self._text_numbers[self._texts[_key(text)]] if text else -1
        shown = (self.media.digest(Image(source)) for source in pictures_of(content))
        return int(number), *(int(self._picture_numbers[self._pictures[one]]) for one in shown)

    def _distinct_texts(self, items: Items) -> Iterator[str]:
        for item in items:
            for text in map(text_of, contents_of(item)):
                if text and _key(text) not in self._texts:
                    self._texts[_key(text)] = len(self._texts)
                    yield text

    def _distinct_pictures(self, items: Items) -> Iterator[Any]:
        for item in items:
            for content in contents_of(item):
                for source in pictures_of(content):
                    key = self.media.digest(Image(source))
                    if key not in self._pictures:
                        self._pictures[key] = len(self._pictures)
                        yield self.media.open(Image(source))


def _joined(count: int, groups: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(count,) the place of the first of each one's group, of those in no group their own."""
    numbers = np.arange(count)
    for group in groups:
        numbers[list(group)] = group[0]
    return numbers


def _copies(documents: Sequence[Item], looks: _Looks) -> list[Fault | None]:
    """Of the documents of a record: which are near copies of a positive, or of one before them."""
    numbers = [looks.of(one["content"]) for one in documents]
    faults: list[Fault | None] = [None] * len(documents)
    seen: dict[Any, int] = {}
    for place in sorted(range(len(documents)), key=lambda place: not is_positive(documents[place])):
        best = seen.setdefault(numbers[place], place)
        if best != place:
            what = "positive" if is_positive(documents[best]) else "negative"
            kind = "positive" if is_positive(documents[place]) else "negative"
            faults[place] = Fault(f"a {kind} nearly the same as another {what}")
    return faults


def _score(item: Item) -> float:
    documents = [one for one in item.get("documents", [item]) if is_positive(one)]
    scores = [one["score"] for one in documents if isinstance(one.get("score"), int | float)]
    return max(scores, default=float("-inf"))


def _key(text: str) -> bytes:
    return bytes.fromhex(digest(text))
