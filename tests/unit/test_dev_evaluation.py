"""Dev sources: judged sparsely, one task each, ranked as the definition says."""

import json

import numpy as np
import pytest
import torch

from mmembed.config.blocks import SourceConfig
from mmembed.content import Task
from mmembed.data.dataset import RecordDataset
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.training.evaluation import build_dev_set, evaluate


def dataset(tmp_path, records):
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(path="dev.jsonl", name="dev")
    return RecordDataset(source, cache_dir=tmp_path / "cache", root=tmp_path), source


def test_judgements_are_sparse_and_follow_content_and_id(tmp_path):
    records = [
        {"query": "q0", "documents": [{"content": "a", "id": "1"}, {"content": "b", "relevance": 0}]},
        {"query": "q1", "documents": [{"content": "A", "id": "1", "relevance": 2}, {"content": "b"}]},
        {"query": "q2", "documents": [{"content": "c"}]},
    ]
    dev = build_dev_set(*dataset(tmp_path, records))
    assert len(dev.documents) == 4  # a, b, A, c
    assert [dict(zip(*judged, strict=True)) for judged in map(_lists, dev.judged)] == [
        {0: 1.0, 1: 0.0, 2: 1.0},  # "A" has the id of "a"
        {0: 2.0, 1: 1.0, 2: 2.0},
        {3: 1.0},
    ]


def _lists(judged):
    columns, grades = judged
    return columns.tolist(), grades.tolist()


def test_many_queries_and_documents_take_no_square_of_memory(tmp_path):
    """2,000 queries with a document each: a dense matrix would hold 4,000,000 grades."""
    records = [{"query": f"q{i}", "documents": [{"content": f"d{i}"}]} for i in range(2000)]
    dev = build_dev_set(*dataset(tmp_path, records))
    assert sum(len(columns) for columns, _ in dev.judged) == 2000


def test_mixed_tasks_are_refused(tmp_path):
    records = [
        {"query": "q", "documents": [{"content": "d"}]},
        {"query": "a", "documents": [{"content": "b", "relevance": 0.4}], "task": "sts"},
    ]
    with pytest.raises(ConfigError, match=r"'dev'.*retrieval, sts.*task"):
        build_dev_set(*dataset(tmp_path, records))


@pytest.mark.parametrize("task", [Task.RETRIEVAL, Task.RERANKING, Task.STS])
def test_numbers_follow_the_definition(tmp_path, family_folder, task):
    preprocessor = build_from_settings(EmbedderSettings(str(family_folder("qwen3"))))[1]
    count = 300  # more than a block
    grades = np.random.default_rng(0).uniform(0.1, 1, count).round(3).tolist()
    records = [
        {"query": f"q {i}", "documents": [{"content": f"d {i}", "relevance": grades[i]}], "task": task.value}
        for i in range(count)
    ]
    dev = build_dev_set(*dataset(tmp_path, records))
    table = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))

    def encode(chunk):
        return Embeddings(table[[sum(row.ids) % 1000 for row in chunk.rows]])

    def similarity(a, b):
        return a.vectors @ b.vectors.T

    found = evaluate([dev], encode, lambda _: similarity, preprocessor, 512)
    ids = [table[[sum(row.ids) % 1000 for row in preprocessor.tokenize(side)]] for side in (dev.queries, dev.documents)]
    scores = (ids[0] @ ids[1].T).numpy()
    if task is Task.STS:
        from scipy.stats import spearmanr

        assert found["dev_spearman"] == pytest.approx(spearmanr(np.diagonal(scores), grades).statistic)
        return
    own = np.diagonal(scores)[:, None]
    rank = (scores > own).sum(1) if task is Task.RETRIEVAL else np.zeros(count)
    assert found["dev_recall_at_10"] == pytest.approx((rank < 10).mean())
    assert found["dev_ndcg_at_10"] == pytest.approx(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean(), abs=1e-6)
