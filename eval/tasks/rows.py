"""What evaluation needs to know of a task before its data are opened, whichever benchmark it belongs to."""

from typing import Protocol

RANKINGS = ("retrieval", "reranking")


class TaskRow(Protocol):
    """One task. `eval.tasks.local`, `eval.tasks.mmeb` and `eval.benchmarks` have rows of this kind.

    Attributes:
        name: what a user types.
        folder: where its data lie: a folder below the data root, or a repository of the hub.
        kind: which protocol scores it: `retrieval` (whole corpora), `reranking` (own candidates), or another of mteb.
        category: modalities of query and document as mteb writes them.
        modalities: what a model has to read: `text`, `image`, `frames` (a video as pictures), `video`, `audio`.
        languages: ISO 639 codes of two or three letters.
        main_score: the number that stands for the task, by its name in mteb.
        group: the average that it belongs to. overall: further averages.
    """

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def modalities(self) -> tuple[str, ...]: ...
    @property
    def languages(self) -> tuple[str, ...]: ...
    @property
    def main_score(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def overall(self) -> tuple[str, ...]: ...
    @property
    def has_images(self) -> bool: ...
