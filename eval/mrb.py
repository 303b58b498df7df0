"""Loads the sets of MRB by mteb: from the hub, or from a folder that holds a copy of each."""

from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset

import mmembed.backbones  # noqa: F401 - lets torchvision import on a CPU before mteb pulls it in
from mmembed.errors import ConfigError

HUB = "hub"


class MissingSet(ConfigError):
    """A set that cannot be read here."""


def open_set(name: str, source: str) -> Any:
    """An mteb task with its data loaded.

    Args:
        name: of the task in mteb.
        source: "hub", or a folder with a copy of the set's repository in a subfolder of the task's name.

    Raises:
        MissingSet: it is not there, or cannot be read.
    """
    task: Any = mteb.get_task(name)
    if source != HUB:
        folder = Path(source) / name
        if not folder.is_dir():
            raise MissingSet(f"{name}: there is no {folder}")
        copied = {**task.metadata.dataset, "path": str(folder)}
        task.metadata = task.metadata.model_copy(update={"dataset": copied})
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MissingSet(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    for data in task.dataset["default"].values():
        data["corpus"] = _with_titles(data["corpus"])
    return task


def _with_titles(corpus: Dataset) -> Dataset:
    """Documents whose text begins with their title, as encoders of mteb and the local sets have it."""
    if not {"title", "text"} <= set(corpus.column_names):
        return corpus
    return corpus.map(
        lambda row: {"text": " ".join(filter(None, (row["title"], row["text"])))}, remove_columns=["title"]
    )
