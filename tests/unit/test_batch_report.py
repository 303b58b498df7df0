"""What a run is told about its data before weights are loaded: nothing that a record carries goes unused in silence."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from mmembed.config import build_config
from mmembed.data.collate import Batch, Chunk
from mmembed.data.dataset import RecordDataset
from mmembed.data.labels import BatchLabels
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import build_objective
from mmembed.preprocess import Row
from mmembed.training.batch_report import _batch_lines, check_sources, many_positives

ROOT = Path(__file__).parents[2]
NUMBERS = itertools.count()


def record(*relevances, task="retrieval"):
    documents = [
        {"content": f"document {index} {next(NUMBERS)}", "relevance": value} for index, value in enumerate(relevances)
    ]
    return {"query": f"query {next(NUMBERS)}", "documents": documents, "task": task}


def check(tmp_path, records, objective="contrastive", **data):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    sources = {"train": [{"path": str(path), "name": "some"}], "train_group_size": 4, **data}
    config = build_config({"data": sources, "objective": objective})
    datasets = [RecordDataset(source, cache_dir=tmp_path / "cache") for source in config.data.train]
    check_sources(datasets, config, build_objective(config.objective))


def test_grades_need_several_positives_a_query(tmp_path):
    graded = [record(2, 1, 0)]
    with pytest.raises(ConfigError, match=r"'some' carries 'relevance'.*positives_per_query.*ignore_fields"):
        check(tmp_path, graded)
    check(tmp_path, graded, positives_per_query=2)
    check(tmp_path, graded, ignore_fields=["relevance"])
    check(tmp_path, [record(1, 1, 0)])


def test_labels_want_an_objective_that_reads_them(tmp_path):
    labelled = [{**record(1), "labels": [["hotel", "book"]]}]
    with pytest.raises(ConfigError, match="'some' carries 'labels', which the objective's loss does not read"):
        check(tmp_path, labelled)
    check(tmp_path, labelled, ignore_fields=["labels"])
    check(tmp_path, labelled, objective="tree_supcon")
    with pytest.raises(ConfigError, match="'tree_supcon' compares labels, source 'some' has none"):
        check(tmp_path, [record(1)], objective="tree_supcon")


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ("supcon", "'supcon'"),
        (["alignment", "uniformity"], "'alignment [+] uniformity'"),
        ({"type": "cwcl", "matryoshka": {"dims": [8]}}, "'cwcl'"),
        ([{"type": "cwcl"}, {"type": "captioning", "sides": "queries"}], "'cwcl [+] captioning'"),
        ({"by_source": {"some": "mochi"}}, "'mochi'"),
    ],
)
def test_negatives_want_an_objective_that_compares_them(tmp_path, objective, named):
    with pytest.raises(
        ConfigError, match=f"'some' carries 'negatives', which objective {named} compares no query with.*ignore_fields"
    ):
        check(tmp_path, [record(1, 0)], objective=objective)
    check(tmp_path, [record(1, 0)], objective=objective, ignore_fields=["negatives"])
    check(tmp_path, [record(1)], objective=objective)


@pytest.mark.parametrize(
    "objective",
    ["infonce", "degla", "negclip", ["supcon", "infonce"], ["supcon", "captioning"], {"by_task": {"retrieval": "dcl"}}],
    ids=str,
)
def test_negatives_that_a_part_compares_are_taken(tmp_path, objective):
    check(tmp_path, [record(1, 0)], objective=objective)


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


@pytest.mark.parametrize("matryoshka", [{}, {"matryoshka": {"dims": [8]}}], ids=["plain", "matryoshka"])
@pytest.mark.parametrize(("across", "in_batch", "remote"), [(True, True, 4), (False, True, 0), (True, False, 0)])
def test_the_report_counts_negatives_that_a_query_meets(across, in_batch, remote, matryoshka):
    """Two queries with a positive and a negative each, on each of two processes."""
    documents, queries = torch.arange(4), torch.tensor([10, 11])
    positives = documents[[0, 2], None, None].repeat(1, 1, 2)
    owner, relevance = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    labels = BatchLabels(owner, relevance, documents[:, None].repeat(1, 2), queries, positives, in_batch, "some")
    batch = Batch(2, 4, (Chunk(torch.tensor([0]), (Row([1, 2]),)),), torch.zeros(6, dtype=torch.long), labels)
    objective = build_objective({"type": "contrastive", "cross_device_negatives": across, **matryoshka})
    plan = SimpleNamespace(world_size=2, batch_sizes=(2,))
    preprocessor = SimpleNamespace(family=SimpleNamespace(multimodal=False, tokenizer=None))
    line = _batch_lines(build_config({}), plan, batch, objective, preprocessor, 1)[1]
    own = 2.0 if in_batch else 0.0
    assert f"1.0 hard negatives a query, {own} in-batch negatives of this process (" in line
    assert f") and {remote} of others at most" in line


def test_thousands_of_positives_of_one_query_are_named_with_what_they_cost():
    keys = torch.zeros(64, 40_000, 2, dtype=torch.long)
    labels = BatchLabels(torch.zeros(0), torch.zeros(0), keys[0, :0], keys[:, 0, 0], keys, True, "some")
    batch = Batch(64, 0, (), torch.zeros(64, dtype=torch.long), labels)
    (warning,) = many_positives(batch, 2)
    assert "'some') has 40,000 positives" in warning and "of 128 queries, 78 MB a few times" in warning
    assert many_positives(batch, 1) == []
