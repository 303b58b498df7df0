"""Dev evaluation while training: rankings and correlations on held-out records, seconds instead of a benchmark run.

Each retrieval-like source is ranked over the union of its records' documents, a reranking source over each query's own
judged documents, an STS source is correlated. Documents are the same by content or by id, as in training. Grades are
kept sparsely and scores made a block of queries at a time: memory is that of the vectors. For numbers to publish use
`python -m eval.run`, which ranks over whole corpora.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmembed.config.blocks import SourceConfig
from mmembed.content import Example, Task
from mmembed.data.collate import Chunk, document_keys, plan_chunks, tokenize
from mmembed.data.dataset import RecordDataset
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.heads import log_odds
from mmembed.metrics import ndcg_at_k, rank_by_score, recall_at_k, spearman
from mmembed.objectives.gather import gather_counts, gather_embeddings, gather_rows, world
from mmembed.preprocess import Item, Place, Preprocessor

Similarity = Callable[[Embeddings, Embeddings], Tensor]
BLOCK = 256  # queries scored at once


@dataclass(frozen=True)
class DevSet:
    """One dev source: Q queries, C documents.

    judged: for each query the columns of its judged documents, (n,) int, and their grades, (n,) float32.
    where: the record of each query, then of each document.
    """

    name: str
    task: Task
    queries: tuple[Item, ...]
    documents: tuple[Item, ...]
    judged: tuple[tuple[np.ndarray, np.ndarray], ...]
    where: tuple[str, ...]

    @property
    def own_only(self) -> bool:
        """Whether a query meets its judged documents only."""
        return self.task in (Task.RERANKING, Task.STS)

    def block(self, rows: range, own_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """relevance (R, C) float32 and valid (R, C) bool of some queries, with all documents or `own_only`."""
        relevance = np.zeros((len(rows), len(self.documents)), dtype=np.float32)
        valid = np.full(relevance.shape, not own_only)
        for place, row in enumerate(rows):
            columns, grades = self.judged[row]
            relevance[place, columns], valid[place, columns] = grades, True
        return relevance, valid


def build_dev_set(dataset: RecordDataset, source: SourceConfig) -> DevSet:
    """Reads a dev source into memory. Raises ConfigError where its records are of several tasks."""
    if len(dataset.tasks) > 1:
        raise ConfigError(
            f"data source '{dataset.name}' holds several tasks ({', '.join(sorted(dataset.tasks))}), which are "
            "measured differently; split it into a dev source each, or set its task"
        )
    examples = [dataset[index] for index in range(len(dataset))]
    columns: dict[int, int] = {}  # content key -> column
    by_id: dict[int, list[int]] = {}  # id key -> columns
    documents: list[Item] = []
    where = [example.where for example in examples]
    for example in examples:
        for document in example.documents:
            content, identity = document_keys(document)
            if content not in columns:
                columns[content] = len(documents)
                by_id.setdefault(identity, []).append(len(documents))
                documents.append(Item.of_document(document, source.document_instruction, source.domain))
                where.append(example.where)
    queries = tuple(Item.of_query(example) for example in examples)
    judged = tuple(_judged(example, columns, by_id) for example in examples)
    return DevSet(dataset.name, examples[0].task, queries, tuple(documents), judged, tuple(where))


def metric_names(tasks: Mapping[str, Iterable[Task]]) -> list[str]:
    """What `evaluate` will give for dev sources of these names and tasks, each source's metrics and their means."""
    found = [(name, measure) for name, held in tasks.items() for task in held for measure in _measures(task)]
    return [f"{name}_{measure}" for name, measure in found] + sorted({measure for _, measure in found})


def evaluate(
    dev_sets: Sequence[DevSet],
    encode: Callable[[Chunk], Embeddings],
    similarity: Callable[[DevSet], Similarity],
    preprocessor: Preprocessor,
    token_budget: int,
    share_prefix: bool = False,
    packed: bool = False,
) -> dict[str, float]:
    """-> `{name}_ndcg_at_10`, `{name}_recall_at_10` or `{name}_spearman` a source, and their means without a name.

    Args:
        similarity: how the objective of a source compares.
    """
    found: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    for dev in dev_sets:
        how = (encode, preprocessor, token_budget, share_prefix, packed)
        if preprocessor.prompt.reads_pairs:
            values = _measure(dev, _judge(dev, *how), own_only=True)
        else:
            queries = embed_items(dev.queries, dev.where, *how)
            documents = embed_items(dev.documents, dev.where[len(dev.queries) :], *how)
            values = _measure(dev, functools.partial(_compare, queries, documents, similarity(dev)), dev.own_only)
        for key, value in values.items():
            metrics[f"{dev.name}_{key}"] = value
            found.setdefault(key, []).append(value)
    return {**metrics, **{key: float(np.mean(values)) for key, values in found.items()}}


def _measures(task: Task) -> tuple[str, ...]:
    return ("spearman",) if task is Task.STS else ("ndcg_at_10", "recall_at_10")


def _compare(queries: Embeddings, documents: Embeddings, similarity: Similarity, rows: range) -> np.ndarray:
    """(R, C) of some queries with all documents."""
    scores: np.ndarray = similarity(queries.rows(torch.tensor(rows)), documents).float().numpy()
    return scores


def _judge(dev: DevSet, *how: Any) -> Callable[[range], np.ndarray]:
    """A reranker's scores of each query's judged documents."""
    owners = [(row, int(column)) for row, (columns, _) in enumerate(dev.judged) for column in columns]
    places = [
        Place(row, number) for row, (columns, _) in enumerate(dev.judged) for number in range(1, len(columns) + 1)
    ]
    items = [
        replace(dev.queries[row], document=dev.documents[column].content, place=place)
        for (row, column), place in zip(owners, places, strict=True)
    ]
    logits = embed_items(items, [dev.where[row] for row, _ in owners], *how).vectors  # (N, L)
    found = log_odds(logits).float().numpy()
    starts = np.cumsum([0, *(len(columns) for columns, _ in dev.judged)])

    def scores(rows: range) -> np.ndarray:
        table = np.zeros((len(rows), len(dev.documents)), np.float32)
        for place, row in enumerate(rows):
            table[place, dev.judged[row][0]] = found[starts[row] : starts[row + 1]]
        return table

    return scores


def _measure(dev: DevSet, score: Callable[[range], np.ndarray], own_only: bool) -> dict[str, float]:
    ndcg, recall, scored, graded = [], [], [], []
    for start in range(0, len(dev.queries), BLOCK):
        rows = range(start, min(start + BLOCK, len(dev.queries)))
        scores = score(rows)  # (R, C)
        relevance, valid = dev.block(rows, own_only)  # (R, C) each
        if dev.task is Task.STS:
            scored.append(scores[valid])
            graded.append(relevance[valid])
        else:
            ranked, judged = rank_by_score(scores, relevance, valid)
            ndcg.append(ndcg_at_k(ranked, judged, 10))
            recall.append(recall_at_k(ranked, judged, 10))
    if dev.task is Task.STS:
        return {"spearman": spearman(np.concatenate(scored), np.concatenate(graded))}
    return {"ndcg_at_10": float(np.concatenate(ndcg).mean()), "recall_at_10": float(np.concatenate(recall).mean())}


def _judged(example: Example, columns: dict[int, int], by_id: dict[int, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """One query's columns and grades: also of other documents with the id of one of its documents."""
    grades: dict[int, float] = {}
    for document in example.documents:
        content, identity = document_keys(document)
        for column in {columns[content], *by_id.get(identity, ())}:
            grades[column] = max(grades.get(column, 0.0), document.relevance)
    return np.array(list(grades), dtype=np.int64), np.array(list(grades.values()), dtype=np.float32)


def embed_items(
    items: Sequence[Item],
    where: Sequence[str],
    encode: Callable[[Chunk], Embeddings],
    preprocessor: Preprocessor,
    token_budget: int,
    share_prefix: bool = False,
    packed: bool = False,
) -> Embeddings:
    """Embeddings on the CPU in the order of items. Processes share the chunks: all of them have to call it.

    Args:
        where: the record each item is of, for error messages; at least as many.
    """
    where = where[: len(items)]
    rows = tokenize(preprocessor, items, where)
    shareable = [preprocessor.shareable(row) for row in rows] if share_prefix else None
    chunks = plan_chunks(rows, token_budget, where=where, shareable=shareable, packed=packed)
    rank, size = world()
    rounds = -(-len(chunks) // size)  # of each process, as a forward may be a collective; the last chunk is repeated
    mine = [chunks[min(number, len(chunks) - 1)] for number in range(rank, rounds * size, size)]
    embeddings = Embeddings.concatenate([encode(chunk) for chunk in mine])
    index = torch.cat([chunk.index for chunk in mine]).to(embeddings.vectors.device)  # (n,)
    counts = gather_counts(len(index), index.device)
    index = gather_rows(index, counts).cpu()
    vectors, mask, *_ = gather_embeddings(embeddings, counts)
    order = torch.empty(len(items), dtype=torch.long)
    order[index] = torch.arange(len(index))
    return Embeddings(vectors.cpu(), None if mask is None else mask.cpu()).rows(order)
