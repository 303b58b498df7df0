"""Objectives: embeddings + labels -> a scalar and metrics.

An objective owns what a loss must not know: the gather across processes, the similarity, the temperature, the masks of
duplicates and false negatives. Local queries meet the candidates of all processes through a differentiable gather and
the loss is the mean over local queries; the training step averages gradients over processes, so no world-size factor
appears anywhere. One file per objective; `build_objective(block)` reads the YAML block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.registry import Registry


@dataclass(frozen=True)
class View:
    """What health monitors look at of one comparison: Q local queries, C candidates.

    similarities, relevance, valid: (Q, C), without temperature; `valid` after all masks.
    masked: why candidates were taken out -> the share of all cells.
    chance: the loss if all scores were equal.
    """

    queries: Embeddings
    candidates: Embeddings
    similarities: Tensor
    relevance: Tensor
    valid: Tensor
    masked: dict[str, Tensor]
    chance: Tensor


class Objective(nn.Module):
    """Base of the objectives.

    `gather` runs the collectives once; `compare` turns what it gave into the loss and may run several times on
    truncated embeddings (matryoshka). `reads` names what is used of the labels beyond positive or not.
    """

    name: ClassVar[str]

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def across_processes(self) -> bool:
        """Whether a query meets the documents of other processes."""
        return False

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        """Q queries, C documents -> (Q, C) similarities as the objective compares them, without temperature."""
        raise NotImplementedError

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Any:
        """Q local queries, D local documents -> what `compare` needs, from all processes."""
        raise NotImplementedError

    def truncate(self, gathered: Any, size: int) -> Any:
        """What `gather` gave, with embeddings cut to their first `size` dimensions."""
        raise NotImplementedError

    def compare(self, gathered: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """-> scalar loss (mean over local queries), detached scalar metrics."""
        raise NotImplementedError

    def view(self, gathered: Any) -> View:
        """What `gather` gave, for the health monitors."""
        raise NotImplementedError

    def forward(
        self, queries: Embeddings, documents: Embeddings, labels: BatchLabels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Q local queries and D local documents -> scalar loss, detached scalar metrics."""
        return self.compare(self.gather(queries, documents, labels))


OBJECTIVES: Registry[Objective] = Registry("mmembed.objectives", Objective)


def build_objective(block: str | Mapping[str, Any], embedding_size: int | None = None) -> Objective:
    """Builds `contrastive` or `{type: contrastive, temperature: .05, matryoshka: {dims: [256, 64]}, ...}`.

    `matryoshka` wraps any objective. Raises ConfigError on unknown names and options, and on dims above
    `embedding_size`.
    """
    from mmembed.objectives.matryoshka import Matryoshka

    options = {"type": block} if isinstance(block, str) else dict(block)
    matryoshka = options.pop("matryoshka", None)
    objective = OBJECTIVES.build(options)
    return objective if matryoshka is None else Matryoshka.build(objective, matryoshka, embedding_size)
