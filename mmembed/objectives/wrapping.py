"""Base of the objectives that ask another one several times: of shorter vectors, or of those of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmembed.embeddings import Embeddings, Layer
from mmembed.objectives import Objective

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


class Wrapping(Objective):
    """Everything is the wrapped objective's but what a subclass says.

    Args:
        objective: what is wrapped.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.takes_negatives = objective.takes_negatives

    @property
    def reads(self) -> frozenset[str]:
        return self.objective.reads

    @property
    def title(self) -> str:
        return self.objective.title

    @property
    def pairs(self) -> bool:
        return self.objective.pairs

    @property
    def layers(self) -> frozenset[Layer]:
        return self.objective.layers

    @property
    def teacher_momentum(self) -> float | None:
        return self.objective.teacher_momentum

    @property
    def across_processes(self) -> bool:
        return self.objective.across_processes

    def check(self, sources: Sequence[Source]) -> None:
        self.objective.check(sources)

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return self.objective.similarity_of(queries, documents)

    def gather(self, *args: Any) -> Any:
        return self.objective.gather(*args)

    def truncate(self, gathered: Any, dims: slice) -> Any:
        return self.objective.truncate(gathered, dims)

    def commit(self) -> None:
        self.objective.commit()

    def forget(self) -> None:
        self.objective.forget()
