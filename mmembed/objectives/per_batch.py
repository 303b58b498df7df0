"""Each batch its own objective: by the task of its records, or by its source.

L = L_k of the batch, k its task (`objective: {by_task: {retrieval: ..., sts: ...}}`) or its source (`by_source`). A
batch holds one source, the same on all processes, so all of them run the same objective's collectives. How often which
one comes is said by `data.mixing` (CoDiEmb, arXiv 2508.11442: in proportion to the batches). Cost: that of the one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from mmembed.content import Role, Task
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings, Layer
from mmembed.errors import ConfigError, nearest
from mmembed.objectives import Objective, View, one_teacher

if TYPE_CHECKING:
    from mmembed.data.streaming import Source


@dataclass(frozen=True)
class Chosen:
    """What the objective `name` gathered."""

    name: str
    gathered: Any


class PerBatch(Objective):
    """Built from a block with `by_task` or `by_source`, see `mmembed.objectives.build_objective`.

    Metrics are those of the batch's objective and `loss_<name>`. Learned parameters of the others get a gradient of 0.

    Args:
        by: what chooses.
        objectives: by name of the task or source.

    Raises:
        ConfigError: no entry, one for a task that does not exist, or two that want different teachers.
    """

    def __init__(self, by: Literal["by_task", "by_source"], objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        if not objectives:
            raise ConfigError(f"objective.{by}: is empty; give an objective each")
        tasks = [task.value for task in Task]
        for name in objectives if by == "by_task" else ():
            if name not in tasks:
                raise ConfigError(f"objective.by_task: there is no task '{name}'; {nearest(name, tasks)}")
        self.by, self.names = by, tuple(objectives)
        self.objectives = nn.ModuleList(objectives.values())
        self.routes = any(objective.routes for objective in objectives.values())
        self.takes_negatives = any(objective.takes_negatives for objective in objectives.values())
        self._momentum = one_teacher(objectives)

    @property
    def title(self) -> str:
        return ", ".join(self.names)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(self._entry(name).reads for name in self.names))

    @property
    def layers(self) -> frozenset[Layer]:
        return frozenset().union(*(self._entry(name).layers for name in self.names))

    @property
    def teacher_momentum(self) -> float | None:
        return self._momentum

    @property
    def predicts(self) -> frozenset[Role]:
        return frozenset().union(*(self._entry(name).predicts for name in self.names))

    def part_for(self, source: str, task: Task, or_first: bool = False) -> Objective:
        if or_first and self._key(source, task) not in self.names:
            return self._entry(self.names[0])
        return self._entry(self._name(source, task))

    def check(self, sources: Sequence[Source]) -> None:
        """Raises ConfigError where a source has no entry, or several, or an entry no source, or does not suit it."""
        of: dict[str, list[Source]] = {name: [] for name in self.names}
        for source in sources:
            names = {self._name(source.name, task) for task in source.tasks}
            if len(names) > 1:
                raise ConfigError(
                    f"data source '{source.name}' holds records of several tasks ({', '.join(sorted(names))}), a batch "
                    "has one objective; split it into a source each, or set its task"
                )
            of[names.pop()].append(source)
        for name, found in of.items():
            if not found:
                raise ConfigError(f"objective.{self.by}.{name}: no source of data.train is trained with it; remove it")
            self._entry(name).check(found)

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        """Of the first entry; that of a batch has `part_for`."""
        return self._entry(self.names[0]).similarity_of(queries, documents)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Chosen:
        name = self._name(labels.source, labels.task)
        return Chosen(name, self._entry(name).gather(queries, documents, labels))

    def truncate(self, gathered: Chosen, dims: slice) -> Chosen:
        return replace(gathered, gathered=self._entry(gathered.name).truncate(gathered.gathered, dims))

    def compare(self, gathered: Chosen) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._entry(gathered.name).compare(gathered.gathered)
        return loss, {**metrics, f"loss_{gathered.name}": loss.detach()}

    def remember(self, gathered: Chosen) -> None:
        self._entry(gathered.name).remember(gathered.gathered)

    def commit(self) -> None:
        for name in self.names:
            self._entry(name).commit()

    def forget(self) -> None:
        for name in self.names:
            self._entry(name).forget()

    def view(self, gathered: Chosen) -> View:
        """Of the batch's objective. The log's loss is a mean over several, so that of equal scores is not compared."""
        return replace(self._entry(gathered.name).view(gathered.gathered), chance=None)

    def _entry(self, name: str) -> Objective:
        entry = self.objectives[self.names.index(name)]
        assert isinstance(entry, Objective), "the constructor took nothing else"
        return entry

    def _key(self, source: str, task: Task) -> str:
        return task.value if self.by == "by_task" else source

    def _name(self, source: str, task: Task) -> str:
        name = self._key(source, task)
        if name not in self.names:
            what = f"task '{name}'" if self.by == "by_task" else "it"
            raise ConfigError(
                f"data source '{source}': objective.{self.by} has no entry for {what} (there are "
                f"{', '.join(self.names)}); add one"
            )
        return name
