"""What a run is told about its data before weights are loaded: nothing that a record carries goes unused in silence."""

import json

import pytest
import torch

from mmembed.config import build_config
from mmembed.data.dataset import RecordDataset
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources


def record(*relevances, task="retrieval"):
    documents = [{"content": f"document {index}", "relevance": value} for index, value in enumerate(relevances)]
    return {"query": "query", "documents": documents, "task": task}


def check(tmp_path, records, **data):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    config = build_config({"data": {"train": [{"path": str(path), "name": "some"}], "train_group_size": 4, **data}})
    datasets = [RecordDataset(source, cache_dir=tmp_path / "cache") for source in config.data.train]
    check_sources(datasets, config, build_objective(config.objective))


def test_grades_need_several_positives_a_query(tmp_path):
    graded = [record(2, 1, 0)]
    with pytest.raises(ConfigError, match=r"'some' carries 'relevance'.*positives_per_query.*ignore_fields"):
        check(tmp_path, graded)
    check(tmp_path, graded, positives_per_query=2)
    check(tmp_path, graded, ignore_fields=["relevance"])
    check(tmp_path, [record(1, 1, 0)])


def test_grades_act_where_they_are_accepted():
    """With one positive the grade cannot matter, whatever it is: this is why it is refused; with two it does."""
    values, valid = torch.tensor([[2.0, 1.0, 0.5]]), torch.ones(1, 3, dtype=torch.bool)

    def loss(*relevances):
        return LOSSES.build("infonce")(Scores(values, torch.tensor([relevances]), valid)).item()

    assert loss(2.0, 0.0, 0.0) == loss(1.0, 0.0, 0.0)
    assert loss(2.0, 1.0, 0.0) != loss(1.0, 1.0, 0.0) != loss(1.0, 2.0, 0.0)
