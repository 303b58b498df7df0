"""What a run is told about its data before weights are loaded: nothing that a record carries goes unused in silence."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mmembed.config import build_config
from mmembed.data.dataset import RecordDataset
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
def test_middling_sentence_pairs_are_refused_before_a_batch_is_drawn(tmp_path, on_bad_record):
    pairs = [record(value, task="sts") for value in (1.0, 0.8)]
    check(tmp_path, pairs, on_bad_record=on_bad_record)
    for middling in (0.0, 0.4):
        with pytest.raises(ConfigError, match=r"'some': 1 STS records, .*some.jsonl:3.* below 0.8.*at_least"):
            check(tmp_path, [*pairs, record(middling, task="sts")], on_bad_record=on_bad_record)


def test_the_sources_of_the_data_page_can_be_trained_on(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    tree = yaml.safe_load(page.split("```yaml\ndata:")[1].split("```")[0].join(["data:", ""]))
    sources = [source for source in tree["data"]["train"] if (ROOT / "data" / source["path"]).exists()]
    assert {"pairs", "beir", "labelled"} <= {source["format"] for source in sources}
    config = build_config({"data": {**tree["data"], "train": sources, "root": str(ROOT / "data")}})
    datasets = [RecordDataset(source, root=config.data.root) for source in config.data.train]
    check_sources(datasets, config, build_objective(config.objective))
