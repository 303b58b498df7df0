"""The numbers of one source, from one pass over its records.

All records count for: records, contents, exact copies, judgements that contradict each other, kinds, lengths in
characters, relevance, labels, scores (percentiles of 20,000 of them), sizes of pictures. A uniform sample counts for
what costs more: languages, words and near-duplicates of the texts, and what pictures look like.

Cost: 0.3 ms a record with two documents, and what its pictures need to be read; memory is that of the samples and 80
MB, whatever the number of records; 16 bytes of disk a document for a while.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from data_tools.inspection.contents import Keys, kinds_of, number, pictures_of, text_of
from data_tools.inspection.reading import Reading
from data_tools.inspection.sketches import Digests, Names, Numbers, Repeated, Reservoir
from data_tools.languages import SURE, UNDETERMINED, identify
from data_tools.near_duplicates import picture_groups, text_groups
from mmembed.content import Content, Document, Example, Image, Task
from mmembed.data.dataset import fields_of
from mmembed.data.words import split_words
from mmembed.errors import MediaError, RecordError
from mmembed.media import MediaStore
from mmembed.thumbnails import shortened

BINS = 40
MOST_REPEATED = 8
LEVELS = 50  # relevances that are counted apart
LABELS = 15  # that are listed
SAMPLES = 8  # records that are shown
GROUPS = 5  # of near-duplicates that are shown
KEPT = 4000  # characters of a sampled text
PREVIEW = 100
SIMILARITY = 0.8  # of near-duplicate texts
PICTURES = 6  # of a group that are shown
FEWER_PICTURES = 10  # texts a picture that is sampled


class Side:
    """The contents of one side: queries, or documents."""

    def __init__(self, folder: Path, sample: int, seed: int) -> None:
        self.contents = Digests(folder)
        self.repeated: Repeated[tuple[str, str, str]] = Repeated()  # text, place, picture
        self.kinds: Counter[str] = Counter()
        self.characters = Numbers(seed)
        self.texts: Reservoir[tuple[bytes, str, str]] = Reservoir(sample, seed)
        self.pictures: Reservoir[tuple[Image, str]] = Reservoir(max(1, sample // FEWER_PICTURES), seed)
        self.pixels = Numbers(seed)

    def add(self, content: Content, key: bytes, where: str, media: MediaStore) -> None:
        text = text_of(content)
        digest = number(key)
        self.contents.add(digest)
        picture = next((str(image.source) for image in pictures_of(content)), "")
        self.repeated.add(digest, (shortened(text, PREVIEW), where, picture))
        self.kinds[kinds_of(content)] += 1
        if text:
            self.characters.add(len(text))
            if (place := self.texts.place()) is not None:
                self.texts.put(place, (key, text[:KEPT], where))
        for image in pictures_of(content):
            width, height = media.size(image)
            self.pixels.add(width * height)
            if (place := self.pictures.place()) is not None:
                self.pictures.put(place, (image, where))

    def as_dict(self, media: MediaStore) -> dict[str, Any]:
        distinct, repeated = self.contents.summary(MOST_REPEATED)
        looks = [(count, self.repeated.of(digest)) for digest, count in repeated.items()]
        texts = self.texts.items()
        words = Numbers()
        for _, text, _ in texts:
            words.add(len(split_words(text)))
        return {
            "contents": self.contents.count,
            "distinct": distinct,
            "copies": self.contents.count - distinct,
            "most_repeated": [{"count": count, "text": look[0], "where": look[1], "picture": look[2]}
                              for count, look in looks if look is not None],
            "kinds": dict(self.kinds.most_common()),
            "characters": self.characters.as_dict() | _binned({"all": self.characters}),
            "words": words.as_dict(),
            "languages": languages([text for _, text, _ in texts]),
            "near_duplicate_texts": near_texts(texts, self.texts.seen),
            "pictures": {"count": self.pixels.count, "pixels": self.pixels.as_dict()},
            "near_duplicate_pictures": near_pictures(self.pictures, media),
        }  # fmt: skip

    def close(self) -> None:
        self.contents.close()


class Statistics:
    """Counts the examples of a source.

    Args:
        folder: where digests lie meanwhile.
        sample: texts of a side whose languages and near-duplicates are counted; a tenth as many pictures.
    """

    def __init__(self, reading: Reading, folder: Path, sample: int, seed: int = 0) -> None:
        self.reading, self.media = reading, reading.media
        self.records = 0
        self.keys = Keys(reading.media)
        self.queries, self.documents = Side(folder, sample, seed), Side(folder, sample, seed + 1)
        self.positive_pairs, self.negative_pairs = Digests(folder), Digests(folder)
        self.tasks: Counter[str] = Counter()
        self.fields: Counter[str] = Counter()
        self.instructions, self.labels = Names(), list[Names]()
        self.positives, self.negatives = Numbers(seed), Numbers(seed)
        self.levels: Counter[float] = Counter()
        self.other_levels, self.relevance = 0, Numbers(seed)
        self.scores = {"positives": Numbers(seed), "negatives": Numbers(seed)}
        self.compared, self.first = 0, 0
        self.shown: Reservoir[Example] = Reservoir(SAMPLES, seed)

    def read(self) -> None:
        """Counts all examples; what has a picture that cannot be read is bad, too."""
        for example in self.reading.examples():
            try:
                self._add(example)
            except RecordError as error:
                self.reading.bad.add(error)

    def _add(self, example: Example) -> None:
        query = self.keys.key(example.query, example.where)  # first: it may raise, and then nothing is counted
        documents = [self.keys.key(document.content, example.where) for document in example.documents]
        self.records += 1
        first = self.documents if self.reading.raw else self.queries
        first.add(example.query, query, example.where, self.media)
        for document, key in zip(example.documents, documents, strict=True):
            self.documents.add(document.content, key, example.where, self.media)
            if example.task is not Task.STS:
                pair = blake2b(query + key, digest_size=8).digest()
                (self.positive_pairs if document.relevance > 0 else self.negative_pairs).add(number(pair))
            self._grade(document.relevance)
        self.tasks[example.task.value] += 1
        self.fields.update(set(fields_of(example)))
        if example.instruction is not None:
            self.instructions.add(example.instruction)
        for path in example.labels:
            for level, name in enumerate(path):
                if level == len(self.labels):
                    self.labels.append(Names())
                self.labels[level].add(name)
        if not self.reading.raw:
            relevant = sum(document.relevance > 0 for document in example.documents)
            self.positives.add(relevant)
            self.negatives.add(len(documents) - relevant)
            self._compare(example.documents)
        if (place := self.shown.place()) is not None:
            self.shown.put(place, example)

    def _grade(self, relevance: float) -> None:
        self.relevance.add(relevance)
        level = round(relevance, 6)
        if level in self.levels or len(self.levels) < LEVELS:
            self.levels[level] += 1
        else:
            self.other_levels += 1

    def _compare(self, documents: Sequence[Document]) -> None:
        """Scores of both sides, and whether a positive has the highest."""
        right = [one.score for one in documents if one.relevance > 0 and one.score is not None]
        wrong = [one.score for one in documents if one.relevance <= 0 and one.score is not None]
        for name, scores in (("positives", right), ("negatives", wrong)):
            for score in scores:
                self.scores[name].add(score)
        if right and wrong:
            self.compared += 1
            self.first += max(right) > max(wrong)

    def as_dict(self) -> dict[str, Any]:
        """The entry of the source in report.json. Takes the sampled texts and pictures apart: seconds."""
        bad = self.reading.bad
        found: dict[str, Any] = {
            "source": self.reading.source.name,
            "path": str(self.reading.path),
            "format": self.reading.source.format,
            "records": self.records,
            "bad": {"count": bad.kinds.total(), "kinds": dict(bad.kinds.most_common()), "shown": bad.shown},
            "tasks": dict(self.tasks.most_common()),
            "fields": dict(sorted(self.fields.items())),
            "instructions": self.instructions.as_dict(LABELS),
            "queries": None if self.reading.raw else self.queries.as_dict(self.media),
            "documents": self.documents.as_dict(self.media),
            "positives": self.positives.as_dict(),
            "negatives": self.negatives.as_dict(),
            "contradictions": self.positive_pairs.also_in(self.negative_pairs),
            "relevance": {
                "levels": {f"{level:g}": count for level, count in sorted(self.levels.items())},
                "other_levels": self.other_levels,
                **(self.relevance.as_dict() | _binned({"all": self.relevance})),
            },
            "labels": [names.as_dict(LABELS) for names in self.labels],
            "scores": {
                **{name: values.as_dict() for name, values in self.scores.items()},
                **_binned(self.scores),
                "compared": self.compared,
                "positive_first": round(self.first / self.compared, 6) if self.compared else None,
            },
        }
        for side in (self.queries, self.documents):
            side.close()
        for pairs in (self.positive_pairs, self.negative_pairs):
            pairs.close()
        return found


def languages(texts: Sequence[str]) -> dict[str, Any]:
    """Counts by language; `und` stands for texts whose language is not sure."""
    guesses = identify(texts)
    counts = Counter(code if confidence >= SURE else UNDETERMINED for code, confidence in guesses)
    return {"sampled": len(texts), "counts": dict(counts.most_common())}


def near_texts(texts: Sequence[tuple[bytes, str, str]], seen: int) -> dict[str, Any]:
    """Groups of sampled texts that are nearly the same; exact copies are one text.

    texts: how many distinct ones were compared. of: how many texts the sample is drawn from. members: in all groups.
    """
    first: dict[bytes, tuple[str, str]] = {}
    for key, text, where in texts:
        first.setdefault(key, (text, where))
    distinct = list(first.values())
    groups = sorted(text_groups((text for text, _ in distinct), SIMILARITY), key=len, reverse=True)
    shown = [[{"text": shortened(distinct[one][0], 200), "where": distinct[one][1]} for one in group[:3]]
             for group in groups[:GROUPS]]  # fmt: skip
    members = sum(map(len, groups))
    return {"texts": len(distinct), "of": seen, "groups": len(groups), "members": members, "shown": shown}


def near_pictures(pictures: Reservoir[tuple[Image, str]], media: MediaStore) -> dict[str, Any]:
    """As `near_texts`, of pictures. Those that do not decode are counted in `damaged`, and the first named."""
    first: dict[str, tuple[Image, str]] = {}
    for image, where in pictures.items():
        first.setdefault(str(image.source), (image, where))
    sampled = list(first.values())
    damaged: list[str] = []

    def opened() -> Iterator[PIL.Image.Image | None]:
        for image, where in sampled:
            try:
                yield media.open(image)
            except MediaError as error:
                damaged.append(f"{where}: {error}")
                yield None

    groups = sorted(picture_groups(opened()), key=len, reverse=True)
    return {
        "pictures": len(sampled), "of": pictures.seen, "groups": len(groups), "members": sum(map(len, groups)),
        "shown": [[{"picture": str(sampled[one][0].source), "where": sampled[one][1]} for one in group[:PICTURES]]
                  for group in groups[:GROUPS]],
        "damaged": len(damaged), "damaged_shown": damaged[:GROUPS],
    }  # fmt: skip


def _binned(series: dict[str, Numbers]) -> dict[str, Any]:
    """Counts in the bins of one histogram, from the 1st to the 99th percentile; outer bins hold what lies beyond.

    Bins of whole numbers hold equally many of them, or the histogram would have gaps that the data has not.
    """
    values = {name: numbers.values() for name, numbers in series.items() if numbers.count}
    if not values:
        return {"bins": None, "histogram": None}
    together = np.concatenate(list(values.values()))
    low, high = (float(one) for one in np.percentile(together, [1, 99]))
    if low == high:
        low, high = float(together.min()), float(together.max())
    if (together == np.round(together)).all() and high - low >= 1:
        width = max(1, int(np.ceil((high - low + 1) / BINS)))
        edges = np.arange(np.floor(low), high + 1 + width, width)[: BINS + 1] - 0.5
    else:
        edges = np.linspace(low, high, BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, BINS + 1)
    counts = {name: np.histogram(np.clip(one, edges[0], edges[-1]), edges)[0].tolist() for name, one in values.items()}
    return {"bins": [round(float(edge), 6) for edge in edges], "histogram": counts}
