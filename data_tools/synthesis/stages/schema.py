"""Records that training reads, with as many documents, levels and fields as were asked for.

Besides what `parse_record` refuses, copies are looked for: a negative that is a positive, or a document that is the
query, but for case, width and white space, teaches the wrong thing or nothing. Negatives that are copies are taken out
of their record; a positive that is the query leaves the record out. Cost: 0.2 ms a record, no memory.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from data_tools.synthesis.sides import Fault, is_positive, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from mmembed.content import Text, to_content
from mmembed.data.records import DOCUMENT_KEYS, RECORD_KEYS, parse_record
from mmembed.errors import ConfigError, RecordError, nearest
from mmembed.registry import Count, Positive, Weight

_OF_DOCUMENTS = "documents."


class Schema(SetStage):
    """Keeps records of the wanted shape.

    Args:
        required: keys that a record must have, as `instruction`; `documents.score` is of each document.
        min_positives, max_positives, min_negatives, max_negatives: how many documents above relevance 0, and at 0.
        levels: relevances that a record must have a document of, each.
        copies: a document may be the query's copy, and negatives may be copies of positives: for training on pairs of
            a text with itself.
    """

    name: ClassVar[str] = "schema"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        required: Sequence[str] = (),
        min_positives: Count = 1,
        max_positives: Positive | None = None,
        min_negatives: Count = 0,
        max_negatives: Count | None = None,
        levels: Sequence[Weight] = (),
        copies: bool = False,
    ) -> None:
        for key in required:
            known = DOCUMENT_KEYS if key.startswith(_OF_DOCUMENTS) else RECORD_KEYS
            if key.removeprefix(_OF_DOCUMENTS) not in known:
                raise ConfigError(f"{self.name}.required: there is no '{key}'; {nearest(key, known)}")
        bounds = {"positives": (min_positives, max_positives), "negatives": (min_negatives, max_negatives)}
        for what, (least, most) in bounds.items():
            if most is not None and most < least:
                raise ConfigError(f"{self.name}: min_{what} {least} is above max_{what} {most}")
        self.required, self.bounds, self.levels, self.copies = required, bounds, frozenset(levels), copies

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        for item in items:
            for one in [item] if self.copies else self._without_copies(item):
                if isinstance(one, Dropped | Trimmed):
                    yield one
                    continue
                fault = self._fault(one)
                yield one if fault is None else Dropped(one, *fault)

    def _without_copies(self, item: Item) -> Iterator[Item | Dropped | Trimmed]:
        query = plain(item["query"])
        positives = {plain(one["content"]) for one in item["documents"] if is_positive(one)}
        yield from without(item, [self._copy(one, query, positives) for one in item["documents"]])

    def _copy(self, document: Any, query: Any, positives: set[Any]) -> Fault | None:
        key = plain(document["content"])
        if key == query:
            return Fault("is the query")
        if not is_positive(document) and key in positives:
            return Fault("a negative that is a positive")
        return None

    def _fault(self, item: Item) -> Fault | None:
        try:
            parse_record(item, f"record '{item['id']}'")
        except RecordError as error:
            return Fault(error.kind, error.found)
        for key in self.required:
            of_document = key.startswith(_OF_DOCUMENTS)
            holders = item["documents"] if of_document else [item]
            if any(holder.get(key.removeprefix(_OF_DOCUMENTS)) in (None, "") for holder in holders):
                return Fault(f"no {key}")
        grades = [float(one.get("relevance", 1.0)) for one in item["documents"]]
        missing = self.levels - set(grades)
        if missing:
            return Fault("a level is missing", ", ".join(f"{level:g}" for level in sorted(missing)))
        counts = {"positives": sum(grade > 0 for grade in grades), "negatives": sum(grade <= 0 for grade in grades)}
        for what, (least, most) in self.bounds.items():
            if item.get("task") == "sts" and what == "positives":
                continue  # graded pairs, some of which are of relevance 0
            if counts[what] < least or (most is not None and counts[what] > most):
                return Fault(f"too {'few' if counts[what] < least else 'many'} {what}", str(counts[what]))
        return None


def plain(content: Any) -> tuple[Any, ...]:
    """What contents that are equal but for case, width and white space have in common."""
    return tuple(
        " ".join(unicodedata.normalize("NFKC", part.text).casefold().split()) if isinstance(part, Text) else part
        for part in to_content(content)
    )
