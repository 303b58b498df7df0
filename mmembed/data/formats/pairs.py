"""Sentence pairs with a similarity score (STS): the score becomes a graded relevance in [0, 1]."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mmembed.data.format_base import Format, RawRecord, column, read_json_lines
from mmembed.errors import ConfigError, RecordError


class Pairs(Format):
    """A folder with `{split}.jsonl`, or one file, of rows with two texts and a number.

    Args:
        split: which file of the folder.
        first, second, score: names of the columns.
        low, high: the scale of the scores; `low` becomes relevance 0 and `high` 1.
        at_least: leave out pairs that score less; contrastive training needs it, since a pair of middling similarity is
            neither positive nor negative (NV-Embed keeps 4 and above of 5, section 4.1.2).
        both_directions: each text is the query of the other one (NV-Embed on STS data).
    """

    name: ClassVar[str] = "pairs"
    streamable: ClassVar[bool] = True

    def __init__(
        self,
        split: str = "train",
        first: str = "sentence1",
        second: str = "sentence2",
        score: str = "score",
        low: float = 0.0,
        high: float = 5.0,
        at_least: float | None = None,
        both_directions: bool = False,
    ) -> None:
        if low >= high:
            raise ConfigError(f"formats.pairs: low {low} is not below high {high}")
        self.split, self.first, self.second, self.score, self.low, self.high = split, first, second, score, low, high
        self.at_least, self.both_directions = low if at_least is None else at_least, both_directions

    def files(self, path: Path) -> list[Path]:
        return [path / f"{self.split}.jsonl" if path.is_dir() else path]

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_json_lines(self.files(path)[0]):
            try:
                if isinstance(row, RecordError):
                    yield row
                    continue
                record = self._record(row, where)
                if row[self.score] >= self.at_least:
                    yield record
                    if self.both_directions:
                        yield self._record({**row, self.first: row[self.second], self.second: row[self.first]}, where)
            except RecordError as error:
                yield error

    def _record(self, row: RawRecord, where: str) -> RawRecord:
        score = column(row, self.score, where)
        if isinstance(score, float) and not math.isfinite(score):
            raise RecordError(where, f"'{self.score}' is {score!r}", "Give a number, or remove the row", "bad number")
        if isinstance(score, bool) or not isinstance(score, int | float) or not self.low <= score <= self.high:
            found = f"'{self.score}' is {score!r}, outside {self.low} to {self.high}"
            raise RecordError(where, found, "Set the options low and high to the scale of the scores", "bad number")
        relevance = (score - self.low) / (self.high - self.low)
        document = {"content": column(row, self.second, where), "relevance": relevance}
        record = {"query": column(row, self.first, where), "documents": [document], "task": "sts", "where": where}
        return {**record, "id": str(row["_id"])} if "_id" in row else record
