"""The descriptions of its class that fit a picture best, a second half of GIST (arXiv 2307.11315, after the abstract).

positives = the `top` descriptions d of the picture's class by cos(picture, d)

A record is a picture with its class in `labels`; what it had as documents goes.
Descriptions come from a run of `class_descriptions`. Positives have the class as id, so that descriptions of one class
are never negatives of each other, as in format `labelled`.
Cost: one pass of the embedder over descriptions, kept in memory, and over pictures, in shards that a kill leaves there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_tools.files import digest
from data_tools.synthesis.encoding import encoded, encoder_of, unit
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.data.format_base import existing, read_json_lines
from mmembed.errors import ConfigError, RecordError
from mmembed.registry import Positive


class MatchDescriptions(SetStage):
    """Pairs pictures with descriptions of their class.

    Args:
        descriptions: documents.jsonl of a run of `class_descriptions`.
        embedder: a block as mining's `retriever`, of a model that reads pictures and texts.
        top: descriptions a picture.
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
        from data_tools.mining.retrievers import Item as Entry

        described = _of_classes(self.file)
        flat = [
            Entry(one["content"], None, None, f"description '{one['id']}'")
            for of_class in described.values()
            for one in of_class
        ]

        def shown() -> Iterator[Entry]:
            return (Entry(item["query"], None, None, f"record '{item['id']}'") for item in items)

        vectors = unit(encoded("descriptions", lambda: iter(flat), self.encoder, "document", context))  # (D, E)
        pictures, start = encoded("pictures", shown, self.encoder, "query", context), 0  # (n, E)
        rows: dict[str, slice] = {}
        for label, of_class in described.items():
            rows[label], start = slice(start, start + len(of_class)), start + len(of_class)
        for place, item in enumerate(items):
            own = label_of(item)
            if own is None or own not in described:
                yield Dropped(item, "no label" if own is None else "no description of its class", own or "")
            else:
                picture = unit(pictures[place : place + 1])[0]  # (E,)
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
    for where, item in read_json_lines(file):
        if isinstance(item, RecordError):
            raise ConfigError(str(item))
        meta = item.get("meta")
        label = meta.get("class") if isinstance(meta, dict) else None
        if not isinstance(label, str) or not all(isinstance(item.get(key), str) for key in ("id", "content")):
            raise ConfigError(f"{where}: no description of a class; give documents of `class_descriptions`")
        found.setdefault(label, []).append(item)
    if not found:
        raise ConfigError(f"{file}: holds no description; give documents of `class_descriptions`")
    return found
