"""What judges candidates beside the retriever: a file each. `type` of the config's `teacher` is the name.

A `PairTeacher` scores pairs of a query and a document; an mmembed reranker is a file with this class. A teacher that is
an embedder is compared by its vectors (`embedder.py`, `late_interaction.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Item
from mmembed.media import MediaStore
from mmembed.registry import Registry


class Teacher:
    """Base of all. See `Retriever`."""

    name: ClassVar[str]
    reads: frozenset[str] = frozenset({"text"})

    def fingerprint(self) -> Any:
        """What its scores depend on, as JSON. Raises MmembedError where there is no such model."""
        raise NotImplementedError

    def load(self, media: MediaStore) -> None:
        """Gets ready for a source."""


class PairTeacher(Teacher):
    """Base of those that read a query with a document."""

    def score(self, queries: Sequence[Item], documents: Sequence[Item]) -> NDArray[np.float32]:
        """(n,) of n pairs, higher is more relevant; it depends on nothing but the pairs of this call."""
        raise NotImplementedError


TEACHERS: Registry[Teacher] = Registry("data_tools.mining.teachers", Teacher)
