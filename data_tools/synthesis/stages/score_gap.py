"""Positives that score clearly above negatives: gates on the `score` of documents.

    keep a positive p with s(p) >= min_positive, and a negative n with s(n) <= max_negative and s(p) - s(n) > margin

for the lowest of the positives. The scores are those that stand in the records, in the units of what gave them: a
judge's grades, a teacher's logits (`data_tools.score`), similarities. With min_positive 3, max_negative 3, margin 0 and
drop: record these are the gates of MultiCSR's curation (grades from 0 to 5). Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from data_tools.synthesis.sides import Fault, is_positive, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from mmembed.errors import ConfigError
from mmembed.registry import Count


class ScoreGap(SetStage):
    """Keeps records and documents whose scores agree with their labels.

    Args:
        margin: by which a positive must score above a negative; at 0 they must differ.
        min_positive, max_negative: bounds of the scores, None for none.
        drop: `documents` takes out those on the wrong side, and the record where no positive is left; `record` leaves a
            record out where one of them is.
        min_negatives: a record with fewer of them left is left out.
        missing: what becomes of a record with a document that has no score: it is left out, or kept unjudged.
    """

    name: ClassVar[str] = "score_gap"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        margin: float = 0.0,
        min_positive: float | None = None,
        max_negative: float | None = None,
        drop: Literal["documents", "record"] = "documents",
        min_negatives: Count = 0,
        missing: Literal["drop", "keep"] = "drop",
    ) -> None:
        if min_positive is not None and max_negative is not None and max_negative - min_positive > 0:
            raise ConfigError(
                f"{self.name}: max_negative {max_negative:g} is above min_positive {min_positive:g}; lower it"
            )
        self.margin, self.min_positive, self.max_negative = margin, min_positive, max_negative
        self.drop, self.min_negatives, self.missing = drop, min_negatives, missing

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        for record in items:
            if any(document.get("score") is None for document in record["documents"]):
                if self.missing == "drop":
                    yield Dropped(record, "no score")
                else:
                    context.notes["records without scores, kept"] += 1
                    yield record
                continue
            faults = self._faults(record)
            first = next((fault for fault in faults if fault is not None), None)
            if first is not None and self.drop == "record":
                yield Dropped(record, *first)
            else:
                yield from self._with_negatives(record, faults)

    def _with_negatives(self, record: Item, faults: list[Fault | None]) -> Iterator[Item | Dropped | Trimmed]:
        pairs = zip(record["documents"], faults, strict=True)
        left = sum(fault is None and not is_positive(document) for document, fault in pairs)
        if left < self.min_negatives:
            yield Dropped(record, "too few negatives", str(left))
        else:
            yield from without(record, faults)

    def _faults(self, record: Item) -> list[Fault | None]:
        faults: list[Fault | None] = [None] * len(record["documents"])
        lowest = float("inf")
        for place, document in enumerate(record["documents"]):
            score = float(document["score"])
            if is_positive(document):
                if self.min_positive is not None and score < self.min_positive:
                    faults[place] = Fault("a positive scores low", f"{score:g}")
                else:
                    lowest = min(lowest, score)
        for place, document in enumerate(record["documents"]):
            if is_positive(document):
                continue
            score = float(document["score"])
            if self.max_negative is not None and score > self.max_negative:
                faults[place] = Fault("a negative scores high", f"{score:g}")
            elif not lowest - score > self.margin:
                faults[place] = Fault("no gap between positive and negative", f"{lowest:g} and {score:g}")
        return faults
