"""Records the other way round: a document becomes the query, the queries that it answers its documents.

Data of captions often asks with the text and answers with the picture; `rewrite`, `alip_gates`, `word_swaps`,
`composition_negatives` and the objectives they serve want the picture as the query and its captions as documents. All
queries of one document (by its id, without one by its content) come into one record, with the relevance that the
document has for each. A document without a positive is left out. Cost: all records in memory, one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from data_tools.files import digest
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage


class TurnAround(SetStage):
    """Makes documents ask and queries answer.

    Args:
        instruction: of the new records; that of the old ones tells what a query asks for, and goes.
    """

    name: ClassVar[str] = "turn_around"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(self, instruction: str | None = None) -> None:
        self.instruction = instruction

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        turned: dict[str, Item] = {}
        for item in items:
            told = {"source": item["source"]} if "source" in item else {}
            told |= {} if self.instruction is None else {"instruction": self.instruction}
            for document in item["documents"]:
                name = document.get("id") or digest(document["content"])
                record = turned.setdefault(name, {"id": name, "query": document["content"], "documents": [], **told})
                answer: dict[str, Any] = {"content": item["query"], "relevance": document.get("relevance", 1.0)}
                record["documents"].append({**answer, "id": item["id"]})
        for record in turned.values():
            relevant = any(one["relevance"] > 0 for one in record["documents"])
            yield record if relevant else Dropped(record, "a document without a positive")
