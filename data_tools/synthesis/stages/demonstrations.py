"""Demonstrations: the labelled records that are nearest to an item, for prompts that show examples of their own kind.

Similar examples teach a language model more than drawn ones ("What Makes Good In-Context Examples for GPT-3?", arXiv
2101.06804, abstract; the order, nearest last, is ours). What is attached are records, not texts of a chat: the stage
behind this one renders them with its own template, as `graded_passages` and `queries` do. Queries are compared with
queries, documents with relevant documents. An example that is the item itself, by its id or its content, is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from data_tools.files import stamps
from data_tools.synthesis.finding import Finder, Library, Wanted, existing
from data_tools.synthesis.stages import Context, Dropped, Item, Items, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.content import Role
from mmembed.data.format_base import FORMATS
from mmembed.data.records import parse_record, with_title
from mmembed.errors import ConfigError, RecordError
from mmembed.registry import Positive


class Demonstrations(SetStage):
    """Attaches labelled records.

    Args:
        examples: records, relative to `root`; of their documents the first of each grade is shown.
        format, options: of the records, as in a training config.
        retriever: a block, as in a config of mining.
        count: of an item.
    """

    name: ClassVar[str] = "demonstrations"
    adds: ClassVar[frozenset[str]] = frozenset({"demonstrations"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        examples: str,
        format: str = "jsonl",
        options: Mapping[str, Any] | None = None,
        retriever: TypedBlock = "bm25",
        count: Positive = 3,
    ) -> None:
        from data_tools.mining.retrievers import RETRIEVERS

        (self.path,) = existing("demonstrations.examples", [below_root(examples)])
        self.format = FORMATS.build({"type": format, **(options or {})})
        self.retriever, self.count, self._built = retriever, count, RETRIEVERS.build(retriever)

    def fingerprint(self) -> Any:
        return [self._built.fingerprint(), stamps(self.format.files(self.path))]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        from data_tools.mining.retrievers import Item as Content

        first = next(iter(items), None)
        if first is None:
            return
        key = "content" if "content" in first else "query"
        examples: dict[str, Item] = {}  # by the id that its content has in the library
        contents = []
        for number, record in enumerate(self._records()):
            examples[str(number)] = record
            shown = record["query"] if key == "query" else _best(record)["content"]
            contents.append(Content(shown, record.get("instruction"), str(number), record.pop("where")))
        library = Library(contents, context.media)
        role: Role = "query" if key == "query" else "document"
        finder = Finder(self.retriever, library, context, (role, role))
        rows_of = _rows_of_ids(library, examples)

        def wanted() -> Iterator[Wanted]:
            for item in items:
                content = Content(item[key], item.get("instruction"), item["id"], f"item '{item['id']}'")
                yield Wanted(content, library.like([], [item[key]]) | rows_of.get(item["id"], set()))

        for item, rows in zip(items, finder.find(wanted, len(items), self.count), strict=True):
            context.notes["items without demonstrations"] += not rows
            nearest = [examples[str(library.documents[row].id)] for row, _ in rows]
            yield {**item, "demonstrations": [_reduced(one) for one in nearest[::-1]]}

    def sampled(self, item: Item, context: Context) -> Item:
        records = (record for record, _ in zip(self._records(), range(self.count), strict=False))
        return {**item, "demonstrations": [_reduced(record) for record in records]}

    def _records(self) -> Iterator[Item]:
        """Raises RecordError at the first that cannot be used."""
        found = False
        for record in self.format.read(self.path):
            if isinstance(record, RecordError):
                raise record
            parse_record(record, record["where"])
            found = True
            yield record
        if not found:
            raise ConfigError(f"demonstrations.examples: {self.path} holds no record; give labelled ones")


def _rows_of_ids(library: Library, examples: Mapping[str, Item]) -> dict[str, set[int]]:
    """The rows of examples, by the ids of their records and of their documents."""
    rows: dict[str, set[int]] = {}
    for row, content in enumerate(library.documents):
        record = examples[str(content.id)]
        for name in (record.get("id"), *(document.get("id") for document in record["documents"])):
            if name is not None:
                rows.setdefault(name, set()).add(row)
    return rows


def _best(record: Item) -> dict[str, Any]:
    """The first of its most relevant documents."""
    best: dict[str, Any] = max(record["documents"], key=lambda document: document.get("relevance", 1.0))
    return best


def _reduced(record: Item) -> Item:
    """What a prompt may show: of each grade the first document."""
    of_grade: dict[float, dict[str, Any]] = {}
    for document in record["documents"]:
        grade, content = document.get("relevance", 1.0), with_title(document, "a document", "a demonstration")
        of_grade.setdefault(grade, {"content": content, "relevance": grade})
    shown: Item = {key: record[key] for key in ("query", "instruction", "meta") if key in record}
    return {**shown, "documents": list(of_grade.values())}
