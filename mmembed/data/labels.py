"""Labels of one local batch: which document belongs to which query, how relevant it is, and what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmembed.content import Task
from mmembed.embeddings import Embeddings

_TOLD_APART = 3


class Grades:
    """The relevances of a source: the lowest, the highest, and how many different ones (3 stands for more)."""

    def __init__(self, low: float = math.inf, high: float = -math.inf, distinct: int = 0) -> None:
        self.low, self.high, self._distinct = low, high, distinct
        self._seen: set[float] = set()

    @property
    def distinct(self) -> int:
        return max(self._distinct, len(self._seen))

    def add(self, relevance: float) -> None:
        self.low, self.high = min(self.low, relevance), max(self.high, relevance)
        if len(self._seen) < _TOLD_APART:
            self._seen.add(relevance)

    def as_list(self) -> list[Any]:
        """What the constructor takes."""
        return [self.low, self.high, self.distinct]


@dataclass(frozen=True)
class BatchLabels:
    """Q local queries, D local documents.

    owner: (D,) long, the local query of each document.
    relevance: (D,) float >= 0, graded, towards its owner.
    document_keys: (D, 2) int64, hashes of the content and of the id (of the content again where there is none);
        documents that agree in one of them are the same (documents that stand for a class carry its name as id).
    query_keys: (Q,) int64, hashes of the content.
    positive_keys: (Q, P, 2) int64, documents known to be relevant to each query, drawn into the batch or not; rows with
        fewer repeat one.
    in_batch: whether other queries' documents are negatives.
    source: the name of the data source, one a batch.
    scores: (D,) float, what a teacher gave each document for its owner, in the teacher's units; NaN where it gave none.
        None: nowhere.
    task: of the records.
    label_keys: (Q, L, D) int64, hashes of the names on each level of each query's label paths, see `label_keys`; 0
        where a path or a level is missing. None: no record has labels.
    label_values: (Q,) float, the number that each query's first label is, see `label_values`. None: no record has
        labels.
    taught: what a teacher encoder makes of the queries and of the documents, without gradients, for an objective with a
        `teacher_momentum`; None elsewhere.
    guide: (Q, G) and (D, G) float, vectors of the queries and of the documents by the objective's `guide_model`; on the
        CPU. None elsewhere.
    """

    owner: Tensor
    relevance: Tensor
    document_keys: Tensor
    query_keys: Tensor
    positive_keys: Tensor
    in_batch: bool = True
    source: str = ""
    scores: Tensor | None = None
    task: Task = Task.RETRIEVAL
    label_keys: Tensor | None = None
    label_values: Tensor | None = None
    taught: tuple[Embeddings, Embeddings] | None = None
    guide: tuple[Tensor, Tensor] | None = None

    def taught_as(self, change: Callable[[Embeddings], Embeddings]) -> BatchLabels:
        """The same labels, `change` made to what the teacher gave."""
        if self.taught is None:
            return self
        return dataclasses.replace(self, taught=(change(self.taught[0]), change(self.taught[1])))

    def to(self, device: torch.device | str) -> BatchLabels:
        """The same labels on another device."""
        tensors: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)


def label_keys(labels: Sequence[Sequence[Sequence[str]]]) -> Tensor | None:
    """Label paths of Q records -> (Q, L, D) int64: as many paths and levels as the record with the most, 0 beyond.

    Returns None where no record has labels.

    >>> keys = label_keys([[("hotel", "book")], [("hotel",), ("taxi",)]])
    >>> keys.shape, bool(keys[0, 0, 0] == keys[1, 0, 0]), keys[0, 1].tolist()
    (torch.Size([2, 2, 2]), True, [0, 0])
    """
    most = max(map(len, labels), default=0)
    if not most:
        return None
    deepest = max(len(path) for paths in labels for path in paths)
    keys = torch.zeros(len(labels), most, deepest, dtype=torch.long)
    for row, paths in enumerate(labels):
        for column, path in enumerate(paths):
            keys[row, column, : len(path)] = torch.tensor([name_key(name) for name in path])
    return keys


def label_values(labels: Sequence[Sequence[Sequence[str]]]) -> Tensor | None:
    """Label paths of Q records -> (Q,) float32: the first one's last name as a number, NaN where it is none.

    Returns None where no record has labels.

    >>> label_values([[("3.5",)], [("age", "40")], [("old",)], []])
    tensor([ 3.5000, 40.0000,     nan,     nan])
    """
    if not any(labels):
        return None
    return torch.tensor([_number(paths[0][-1]) if paths else math.nan for paths in labels], dtype=torch.float32)


def _number(name: str) -> float:
    try:
        found = float(name)
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def name_key(name: str) -> int:
    """64 bits of a hash of a label's name, or of the name of one of its levels; never 0."""
    return int.from_bytes(hashlib.blake2b(b"label" + name.encode(), digest_size=8).digest(), "little", signed=True) or 1
