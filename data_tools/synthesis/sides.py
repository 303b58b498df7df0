"""Queries and documents of items of every kind: what filters of contents look at, and what becomes of a record.

A document that does not pass is taken out of its record. A record whose query does not pass, or that has no positive
left, is left out; an STS record, which need not have a positive, where no document is left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from data_tools.synthesis.stages import Dropped, Item, Kind, Trimmed
from data_tools.synthesis.templates import text_of
from mmembed.errors import ConfigError

Side = Literal["query", "document"]
SIDES_OF: dict[Kind, tuple[Side, ...]] = {
    "documents": ("document",), "queries": ("query",), "records": ("query", "document"),
}  # fmt: skip


class Fault(NamedTuple):
    """Why a content does not pass: `reason` is counted, `found` is shown."""

    reason: str
    found: str = ""


Verdict = Callable[[Side, Any], Fault | None]  # of a content


def sifted(item: Item, verdict: Verdict) -> Iterator[Item | Dropped | Trimmed]:
    """An item of any kind after a look at each of its contents."""
    own: tuple[Side, str] = ("document", "content") if "content" in item else ("query", "query")
    fault = verdict(own[0], item[own[1]])
    if fault is not None:
        yield Dropped(item, f"{own[0]}: {fault.reason}", fault.found)
    elif "documents" in item:
        yield from without(item, [verdict("document", one["content"]) for one in item["documents"]])
    else:
        yield item


def without(record: Item, faults: Sequence[Fault | None]) -> Iterator[Item | Dropped | Trimmed]:
    """A record without its documents that have a fault."""
    pairs = list(zip(record["documents"], faults, strict=True))
    left = [document for document, fault in pairs if fault is None]
    if len(left) == len(pairs):
        yield record
        return
    wanted = any(map(is_positive, record["documents"]))
    if not left or (wanted and not any(map(is_positive, left))):
        fault = next(fault for document, fault in pairs if fault and (is_positive(document) or not wanted))
        yield Dropped(record, f"document: {fault.reason}", fault.found)
        return
    for document, one in pairs:
        if one is not None:
            yield Trimmed(record["id"], document, one.reason, one.found)
    yield {**record, "documents": left}


def is_positive(document: Mapping[str, Any]) -> bool:
    return bool(document.get("relevance", 1.0) > 0)


def contents_of(item: Item, sides: Collection[Side] = ("query", "document")) -> Iterator[Any]:
    """The contents of an item on these sides."""
    if "content" in item and "document" in sides:
        yield item["content"]
    if "query" in item and "query" in sides:
        yield item["query"]
    if "document" in sides:
        yield from (document["content"] for document in item.get("documents", ()))


def matched_texts(item: Item, sides: Collection[Side]) -> list[str]:
    """The texts of an item on these sides; of a record's documents those of its positives."""
    positive = {**item, "documents": [one for one in item.get("documents", ()) if is_positive(one)]}
    return [text for text in map(text_of, contents_of(positive, sides)) if text]


def check_sides(stage: str, kind: Kind, given: Collection[Side]) -> None:
    """Raises ConfigError where options are about a side that items of this kind do not have."""
    for side in given:
        if side not in SIDES_OF[kind]:
            raise ConfigError(f"{stage}: {kind} have no {side}; remove the options of that side")
