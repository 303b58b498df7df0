"""The vectors of a task's queries and documents, and what follows from them without encoding anything again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.tasks.local import Row
from mmembed import metrics
from mmembed.errors import ConfigError

BLOCK = 256  # rows a batch of columns


@dataclass(frozen=True)
class Compared:
    """One retrieval task under one model.

    Attributes:
        queries: (Q, E). documents: (D, E). similarity, relevance: (Q, D).
    """

    queries: np.ndarray
    documents: np.ndarray
    similarity: np.ndarray
    relevance: np.ndarray


def compared(runner: Any, task: Any, row: Row, split: str) -> Compared:
    """Encodes a task whose data are loaded.

    Args:
        runner: an `MtebEncoder`.

    Raises:
        ConfigError: a task without a corpus.
    """
    from mteb.types import PromptType

    if row.kind != "retrieval":
        raise ConfigError(f"{row.name}: a task of kind '{row.kind}' has no corpus, so no vectors of one; leave it out")
    data = task.dataset["default"][split]
    queries, documents = (
        runner.encode(data[key].iter(batch_size=BLOCK), task_metadata=task.metadata, prompt_type=side)
        for key, side in (("queries", PromptType.query), ("corpus", PromptType.document))
    )
    places = {document: place for place, document in enumerate(data["corpus"]["id"])}
    relevance = np.zeros((len(queries), len(documents)))
    for number, query in enumerate(data["queries"]["id"]):
        for document, grade in data["relevant_docs"][query].items():
            if document in places:
                relevance[number, places[document]] = grade
    return Compared(queries, documents, np.asarray(runner.similarity(queries, documents)), relevance)


def as_queries(runner: Any, task: Any, contents: Sequence[Any]) -> np.ndarray:
    """(N, E) vectors of contents in the place of a task's queries, with its instruction."""
    from mteb.types import PromptType

    instruction = runner.instructions.find(task.metadata, PromptType.query)
    return np.asarray(runner.embedder.encode(list(contents), role="query", instruction=instruction), dtype=np.float32)


def ndcg_by_query(similarity: np.ndarray, relevance: np.ndarray, k: int = 10) -> np.ndarray:
    """(Q,) nDCG@k from similarities and relevance (Q, D)."""
    ranked, judged = metrics.rank_by_score(similarity, relevance)
    return metrics.ndcg_at_k(ranked, judged, k)
