"""Two stages on one task: a first stage finds candidates, a reranker scores them. Both run as mteb runs them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchCrossEncoderWrapper, SearchEncoderWrapper

from eval.rows import Found
from mmembed.metrics import Run

KWARGS: dict[str, Any] = {"batch_size": 256, "show_progress_bar": False}


def find(runner: Any, task: Any, split: str, depth: int) -> dict[str, dict[str, float]]:
    """The best `depth` documents of each query: of the task's own candidates where it has some, else of the corpus.

    Args:
        runner: an mteb encoder or search model.
        task: with its data loaded.

    Returns:
        query -> document -> score, best first; equal scores by id, descending, as trec_eval ranks them.
    """
    data = task.dataset["default"][split]
    pool = data["top_ranked"]
    deepest = max(map(len, pool.values())) if pool else depth  # of the pools all is scored, then cut: ties are ours
    found = _search(runner, task, split, deepest, pool)
    return {query: best(documents, depth) for query, documents in found.items()}


def judge(runner: Any, task: Any, split: str, candidates: Mapping[str, Mapping[str, float]]) -> Run:
    """query -> document -> score, of candidates, by an mteb cross-encoder."""
    deepest = max(map(len, candidates.values()), default=1)
    return _search(runner, task, split, deepest, {query: list(found) for query, found in candidates.items()})


def only_part(task: Any) -> tuple[str, Any] | None:
    """The split and the data of a ranking that has one subset and one split; None: it has several."""
    if task.is_aggregate or list(task.dataset) != ["default"] or len(task.dataset["default"]) != 1:
        return None
    (place,) = task.dataset["default"].items()
    return place


def cut(found: Found, depth: int) -> Found:
    """The best `depth` documents of each query."""
    return {part: {query: best(documents, depth) for query, documents in own.items()} for part, own in found.items()}


@contextmanager
def candidates_in(task: Any, found: Found | None) -> Iterator[None]:
    """Gives a task candidates for a while; None: leaves it its own."""
    tables = [(task.dataset[subset][split], own) for (subset, split), own in (found or {}).items()]
    before = [data["top_ranked"] for data, _ in tables]
    for data, own in tables:
        data["top_ranked"] = {query: list(documents) for query, documents in own.items()}
    try:
        yield
    finally:
        for (data, _), pool in zip(tables, before, strict=True):
            data["top_ranked"] = pool


def best(documents: Mapping[str, float], depth: int) -> dict[str, float]:
    ordered = sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True)
    return dict(ordered[:depth])


def _search(
    runner: Any, task: Any, split: str, top_k: int, top_ranked: Mapping[str, list[str]] | None
) -> dict[str, dict[str, float]]:
    data = task.dataset["default"][split]
    about = {"task_metadata": task.metadata, "hf_split": split, "hf_subset": "default", "encode_kwargs": KWARGS}
    if isinstance(runner, EncoderProtocol):
        runner = SearchEncoderWrapper(runner)
    elif isinstance(runner, CrossEncoderProtocol):
        runner = SearchCrossEncoderWrapper(runner)
    runner.index(data["corpus"], **about)
    found: dict[str, dict[str, float]] = runner.search(data["queries"], top_k=top_k, top_ranked=top_ranked, **about)
    return found
