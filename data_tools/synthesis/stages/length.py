"""Texts of the wanted length, and pairs whose lengths are not too unlike.

Words are counted as everywhere here (`wording.words`: two characters are a word where a script has no blanks), tokens
with a tokenizer of your own. Contents without a text pass. Cost: 0.1 ms a text, 0.4 ms with a tokenizer; no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.sides import Fault, Side, check_sides, is_positive, sifted, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from data_tools.synthesis.templates import text_of
from data_tools.synthesis.wording import words
from mmembed.errors import ConfigError
from mmembed.packaged import resolve
from mmembed.registry import Above0, Count, Positive


class Length(SetStage):
    """Keeps texts within bounds.

    Args:
        unit: what is counted.
        tokenizer: folder of a tokenizer, for tokens.
        least, most: bounds of the texts, both included.
        min_query, max_query, min_document, max_document: of one side, in their place.
        max_ratio: how many times as long as the shorter one the longer one of a query and a document of it may be.
    """

    name: ClassVar[str] = "length"

    def __init__(
        self,
        below_root: Callable[[str], Path],
        unit: Literal["words", "characters", "tokens"] = "words",
        tokenizer: str | None = None,
        least: Count = 0,
        most: Positive | None = None,
        min_query: Count | None = None,
        max_query: Positive | None = None,
        min_document: Count | None = None,
        max_document: Positive | None = None,
        max_ratio: Above0 | None = None,
    ) -> None:
        if (unit == "tokens") != (tokenizer is not None):
            raise ConfigError(f"{self.name}: unit 'tokens' and a tokenizer belong together; give both or none")
        own: dict[Side, tuple[int | None, int | None]] = {
            "query": (min_query, max_query), "document": (min_document, max_document),
        }  # fmt: skip
        self.given: list[Side] = [side for side, bounds in own.items() if bounds != (None, None)]
        self.bounds: dict[Side, tuple[int, float]] = {}
        for side, (low, high) in own.items():
            bounds = (least if low is None else low, high or most or float("inf"))
            if bounds[0] > bounds[1]:
                raise ConfigError(
                    f"{self.name}: the least of a {side} is {bounds[0]}, the most {bounds[1]:g}; raise it"
                )
            if bounds != (0, float("inf")):
                self.bounds[side] = bounds
        if not self.bounds and max_ratio is None:
            raise ConfigError(f"{self.name}: has no bound; give least, most or max_ratio")
        if max_ratio is not None and max_ratio < 1:
            raise ConfigError(f"{self.name}.max_ratio: found {max_ratio}; give 1 or more")
        self.unit, self.max_ratio = unit, max_ratio
        self.tokenizer = None if tokenizer is None else _folder(tokenizer, below_root)
        self._count: Callable[[str], int] = {"words": words, "characters": len}.get(unit, self._tokens)
        self._loaded: Any = None

    def gives(self, kind: Kind) -> Kind:
        check_sides(self.name, kind, ["query", "document"] if self.max_ratio is not None else self.given)
        return kind

    def fingerprint(self) -> Any:
        return None if self.tokenizer is None else hashlib.blake2b(self.tokenizer.read_bytes()).hexdigest()

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        for item in items:
            for one in sifted(item, self._verdict):
                if self.max_ratio is None or isinstance(one, Dropped | Trimmed):
                    yield one
                else:
                    yield from without(one, self._unlike(one, self.max_ratio))

    def _verdict(self, side: Side, content: Any) -> Fault | None:
        text = text_of(content)
        if not text or side not in self.bounds:
            return None
        (least, most), count = self.bounds[side], self._count(text)
        if least <= count <= most:
            return None
        return Fault("too short" if count < least else "too long", f"{count} {self.unit}")

    def _unlike(self, record: Item, most: float) -> list[Fault | None]:
        query = self._length(record["query"])
        faults: list[Fault | None] = []
        for document in record["documents"]:
            own = self._length(document["content"])
            low, high = sorted((query, own))
            fine = low == 0 or high <= most * low or not is_positive(document)
            faults.append(None if fine else Fault("lengths unlike", f"{query} and {own} {self.unit}"))
        return faults

    def _length(self, content: Any) -> int:
        """0 of a content without a text."""
        text = text_of(content)
        return self._count(text) if text else 0

    def _tokens(self, text: str) -> int:
        if self._loaded is None:
            from tokenizers import Tokenizer

            self._loaded = Tokenizer.from_file(str(self.tokenizer))
            self._loaded.no_truncation()
        return len(self._loaded.encode(text, add_special_tokens=False).ids)


def _folder(tokenizer: str, below_root: Callable[[str], Path]) -> Path:
    packaged = resolve(tokenizer)
    file = (below_root(tokenizer) if packaged == tokenizer else Path(packaged)) / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"length.tokenizer: there is no {file}; name the folder of a model")
    return file
