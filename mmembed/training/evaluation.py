"""Dev evaluation while training: rankings and correlations on held-out records, seconds instead of a benchmark run.

Each retrieval-like source is ranked over the union of its records' documents, a reranking source over each query's own
judged documents, an STS source is correlated. Documents are the same by content or by id, as in training. For numbers
to publish use `python -m eval.run`, which ranks over whole corpora.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmembed.config import SourceConfig
from mmembed.content import Example, Task
from mmembed.data.collate import Chunk, document_keys, plan_chunks
from mmembed.data.dataset import RecordDataset
from mmembed.embeddings import Embeddings
from mmembed.metrics import ndcg_at_k, rank_by_score, recall_at_k, spearman
from mmembed.objectives.gather import gather_counts, gather_embeddings, gather_rows, world
from mmembed.preprocess import Item, Preprocessor

Similarity = Callable[[Embeddings, Embeddings], Tensor]
BLOCK = 256  # queries scored at once


@dataclass(frozen=True)
class DevSet:
    """One dev source: Q queries, C documents, relevance (Q, C), valid (Q, C)."""

    name: str
    task: Task
    queries: tuple[Item, ...]
    documents: tuple[Item, ...]
    relevance: np.ndarray
    valid: np.ndarray


def build_dev_set(dataset: RecordDataset, source: SourceConfig) -> DevSet:
    """Reads a dev source into memory."""
    examples = [dataset[index] for index in range(len(dataset))]
    task = examples[0].task
    queries = tuple(Item(example.query, "query", example.instruction) for example in examples)
    columns: dict[int, int] = {}  # content key -> column
    documents: list[Item] = []
    keys: list[tuple[int, int]] = []
    for example in examples:
        for document in example.documents:
            key = document_keys(document)
            if key[0] not in columns:
                columns[key[0]] = len(documents)
                documents.append(Item(document.content, "document", source.document_instruction))
                keys.append(key)
    relevance = np.zeros((len(queries), len(documents)), dtype=np.float32)  # (Q, C)
    judged = np.zeros(relevance.shape, dtype=bool)
    ids = np.array([key[1] for key in keys])
    for row, example in enumerate(examples):
        _judge(example, columns, ids, relevance[row], judged[row])
    own_only = task in (Task.RERANKING, Task.STS)
    return DevSet(
        dataset.name, task, queries, tuple(documents), relevance, judged if own_only else ~np.zeros_like(judged)
    )


def evaluate(
    dev_sets: Sequence[DevSet],
    encode: Callable[[Chunk], Embeddings],
    similarity: Similarity,
    preprocessor: Preprocessor,
    token_budget: int,
) -> dict[str, float]:
    """-> `{name}_ndcg_at_10`, `{name}_recall_at_10` or `{name}_spearman` a source, and their means without a name."""
    found: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    for dev in dev_sets:
        queries = _embed(dev.queries, encode, preprocessor, token_budget)
        documents = _embed(dev.documents, encode, preprocessor, token_budget)
        index = torch.arange(len(dev.queries)).split(BLOCK)
        scores = torch.cat([similarity(queries.rows(rows), documents).float() for rows in index]).numpy()  # (Q, C)
        if dev.task is Task.STS:
            values = {"spearman": spearman(scores[dev.valid], dev.relevance[dev.valid])}
        else:
            ranked, judged = rank_by_score(scores, dev.relevance, dev.valid)
            values = {
                "ndcg_at_10": float(ndcg_at_k(ranked, judged, 10).mean()),
                "recall_at_10": float(recall_at_k(ranked, judged, 10).mean()),
            }
        for key, value in values.items():
            metrics[f"{dev.name}_{key}"] = value
            found.setdefault(key, []).append(value)
    return {**metrics, **{key: float(np.mean(values)) for key, values in found.items()}}


def _judge(
    example: Example, columns: dict[int, int], ids: np.ndarray, relevance: np.ndarray, judged: np.ndarray
) -> None:
    """Writes one query's grades, (C,) each: also of other documents with the id of one of its documents."""
    for document in example.documents:
        content, identity = document_keys(document)
        same = ids == identity
        same[columns[content]] = True
        relevance[same] = np.maximum(relevance[same], document.relevance)
        judged |= same


def _embed(
    items: Sequence[Item], encode: Callable[[Chunk], Embeddings], preprocessor: Preprocessor, token_budget: int
) -> Embeddings:
    """Embeddings on the CPU in the order of items. Processes share the chunks."""
    chunks = plan_chunks(preprocessor.tokenize(items), token_budget)
    rank, size = world()
    mine = chunks[rank::size] or chunks[-1:]  # a process without a chunk repeats one: collectives need a shape
    embeddings = Embeddings.concatenate([encode(chunk) for chunk in mine])
    index = torch.cat([chunk.index for chunk in mine]).to(embeddings.vectors.device)  # (n,)
    counts = gather_counts(len(index), index.device)
    index = gather_rows(index, counts).cpu()
    vectors, mask = gather_embeddings(embeddings, counts)
    order = torch.empty(len(items), dtype=torch.long)
    order[index] = torch.arange(len(index))
    return Embeddings(vectors.cpu(), None if mask is None else mask.cpu()).rows(order)
