"""The descriptions of its class that fit a picture best, the second half of GIST (arXiv 2307.11315).

positives = the `top` descriptions d of the picture's class by cos(picture, d)

as the authors' code matches them. A record is a picture with its class in `labels`; what it had as documents goes.
Descriptions come from a run of `class_descriptions`. Positives have the class as id, so that descriptions of one class
are never negatives of each other, as in format `labelled`; the paper's contrastive training makes no such difference.
Cost: one pass of the embedder over descriptions, kept in memory, and over pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_tools.files import digest
from data_tools.synthesis.embedding import encoder_of, unit_vectors
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.data.format_base import existing
from mmembed.errors import ConfigError
from mmembed.registry import Positive

_BATCH = 256  # pictures that are embedded together


class MatchDescriptions(SetStage):
    """Pairs pictures with descriptions of their class.

    Args:
        descriptions: documents.jsonl of a run of `class_descriptions`.
        embedder: a block as mining's `retriever`, of a model that reads pictures and texts.
        top: descriptions a picture (5 in the authors' code).
    """

    name: ClassVar[str] = "match_descriptions"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        descriptions: str = "",
        embedder: TypedBlock | None = None,
        top: Positive = 5,
    ) -> None:
        if not descriptions:
            raise ConfigError(f"{self.name}.descriptions: is missing; give documents.jsonl of `class_descriptions`")
        self.file, self.top = below_root(descriptions), top
        self.encoder = encoder_of(embedder, self.name)

    def fingerprint(self) -> Any:
        return [self.encoder.fingerprint(), digest(existing(self.file).read_bytes())]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        described = _of_classes(self.file)
        self.encoder.load(context.media)
        texts = [one["content"] for of_class in described.values() for one in of_class]
        where = [f"description '{one['id']}'" for of_class in described.values() for one in of_class]
        vectors, start = unit_vectors(self.encoder, texts, where, "document"), 0  # (D, E)
        rows: dict[str, slice] = {}
        for label, of_class in described.items():
            rows[label], start = slice(start, start + len(of_class)), start + len(of_class)
        rest = iter(items)
        while chunk := list(islice(rest, _BATCH)):
            names = [f"record '{item['id']}'" for item in chunk]
            pictures = unit_vectors(self.encoder, [item["query"] for item in chunk], names, "query")  # (n, E)
            for item, picture in zip(chunk, pictures, strict=True):
                own = label_of(item)
                if own is None or own not in described:
                    yield Dropped(item, "no label" if own is None else "no description of its class", own or "")
                else:
                    yield self._matched(item, own, described[own], vectors[rows[own]] @ picture)

    def _matched(self, item: Item, label: str, of_class: list[Item], cosines: Any) -> Item:
        best = np.argsort(-cosines, kind="stable")[: self.top].tolist()
        documents = [
            {
                "content": of_class[place]["content"], "relevance": 1.0, "id": label,
                "meta": {"by": self.name, "of": of_class[place]["id"], "similarity": round(float(cosines[place]), 6)},
            }
            for place in best
        ]  # fmt: skip
        return {**item, "documents": documents}


def label_of(item: Item) -> str | None:
    """The class of a record: its first label, of a path in a tree the last level."""
    label = next(iter(item.get("labels", ())), None)
    return label[-1] if isinstance(label, list) else label


def _of_classes(file: Path) -> dict[str, list[Item]]:
    """Descriptions by class. Raises ConfigError where a line is not one of `class_descriptions`."""
    found: dict[str, list[Item]] = {}
    with existing(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            item = json.loads(line)
            label = item.get("meta", {}).get("class")
            if label is None or "content" not in item:
                raise ConfigError(f"{file}:{number}: no description of a class; give documents of `class_descriptions`")
            found.setdefault(label, []).append(item)
    return found
