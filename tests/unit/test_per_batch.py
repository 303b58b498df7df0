"""Each batch its own objective: which one, what is logged, what is refused."""

import json

import pytest
import torch

from mmembed.config import build_config
from mmembed.content import Task
from mmembed.data.dataset import RecordDataset
from mmembed.errors import ConfigError
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources
from mmembed.training.gradcache import contrastive_step
from mmembed.training.tally import Tally
from tests.equivalence.toy import ToyEncoder, make_batch
from tests.unit.test_graded_pairs import batch

BY_TASK = {"by_task": {"retrieval": {"type": "infonce", "temperature": 0.3}, "sts": [{"type": "pearson", "weight": 2}]}}


def test_a_batch_has_the_objective_of_its_task():
    queries, documents, labels = batch([0.9, 0.1, 0.5])
    objective = build_objective(BY_TASK)
    loss, metrics = objective(queries, documents, labels)
    alone, _ = build_objective("pearson")(queries, documents, labels)
    assert loss.item() == pytest.approx(2 * alone.item())
    assert metrics["loss_sts"].item() == loss.item() and "loss_retrieval" not in metrics
    other = labels.__class__(**{**vars(labels), "task": Task.RETRIEVAL, "in_batch": True})
    loss, metrics = objective(queries, documents, other)
    alone, _ = build_objective(BY_TASK["by_task"]["retrieval"])(queries, documents, other)
    assert loss.item() == alone.item() == metrics["loss_retrieval"].item()
    assert objective.part_for("any", Task.STS).pairs and not objective.part_for("any", Task.RETRIEVAL).pairs


def test_a_batch_has_the_objective_of_its_source():
    queries, documents, labels = batch([0.9, 0.1, 0.5])
    objective = build_objective({"by_source": {"sentences": "pro", "others/x.jsonl": "infonce"}})
    loss, metrics = objective(queries, documents, labels)
    assert loss.item() == metrics["loss_sentences"].item()
    assert loss.item() == build_objective("pro")(queries, documents, labels)[0].item()


def test_a_task_without_an_entry_is_an_error():
    queries, documents, labels = batch([0.9, 0.1, 0.5])
    objective = build_objective({"by_task": {"retrieval": "infonce"}})
    with pytest.raises(ConfigError, match="'sentences': objective.by_task has no entry for task 'sts'.*retrieval"):
        objective(queries, documents, labels)
    assert objective.part_for("dev", Task.STS, or_first=True).name == "contrastive"


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"by_task": {}}, "by_task: is empty"),
        ({"by_task": {"retrival": "infonce"}}, "no task 'retrival'.*'retrieval'"),
        ({"by_task": {"sts": {"type": "pearson", "temprature": 1}}}, "objective.by_task.sts: .*temprature"),
        ({"by_task": {"sts": "pearson"}, "type": "contrastive"}, "by_task stands alone"),
        ({"by_task": "infonce"}, "by_task stands alone"),
        ({"by_task": {"sts": {"by_source": {"x": "pearson"}}, "retrieval": []}}, "retrieval: .*empty"),
    ],
)
def test_wrong_blocks_are_refused(block, named):
    with pytest.raises(ConfigError, match=named):
        build_objective(block)


def test_the_config_knows_the_blocks_inside():
    config = build_config({"objective": BY_TASK}, ["objective.by_task.retrieval.temperature=0.02"])
    assert build_objective(config.objective).part_for("", Task.RETRIEVAL).temperature.value == 0.02
    with pytest.raises(ConfigError, match="late interaction needs pooling"):
        build_config({"objective": {"by_task": {"sts": [{"type": "pearson", "similarity": "maxsim"}]}}})
    with pytest.raises(ConfigError, match="no 'type'"):
        build_config({"objective": {"by_task": {"sts": {"temperature": 1}}}})


def check(tmp_path, objective, tasks):
    sources = []
    for name, of_records in tasks.items():
        documents = [[{"content": f"d {grade}", "relevance": grade}] for grade in (1.0, 0.9, 0.8)]
        records = [
            {"query": f"q {place}", "documents": one, "task": task}
            for task in of_records
            for place, one in enumerate(documents)
        ]
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in records))
        sources.append({"path": str(tmp_path / name), "name": name})
    data = {"train": sources, "ignore_fields": ["relevance"]}
    config = build_config({"data": data, "objective": objective})
    found = [RecordDataset(one, cache_dir=tmp_path / "cache") for one in config.data.train]
    check_sources(found, config, build_objective(config.objective))


def test_sources_and_entries_must_fit(tmp_path):
    check(tmp_path, BY_TASK, {"a": ["retrieval"], "b": ["sts"]})
    with pytest.raises(ConfigError, match="by_task.sts: no source of data.train"):
        check(tmp_path, BY_TASK, {"a": ["retrieval"]})
    with pytest.raises(ConfigError, match=r"'b'.*no entry for task 'sts'"):
        check(tmp_path, {"by_task": {"retrieval": "infonce"}}, {"a": ["retrieval"], "b": ["sts"]})
    with pytest.raises(ConfigError, match=r"'a' holds records of several tasks \(retrieval, sts\)"):
        check(tmp_path, BY_TASK, {"a": ["retrieval", "sts"]})
    with pytest.raises(ConfigError, match=r"'a' \(retrieval\): objective 'pearson' is for graded pairs"):
        check(tmp_path, {"by_source": {"a": "pearson"}}, {"a": ["retrieval"]})


def test_learned_parameters_of_the_other_task_stand_still():
    learned = {"type": "infonce", "temperature": {"value": 0.1, "learn": True}}
    objective = build_objective({"by_task": {"retrieval": learned, "sts": {**learned, "type": "rank_kl"}}})
    contrastive_step(ToyEncoder(), objective, make_batch(4, 2, 30), keep_tokens=0)
    norms = [parameter.grad.abs().item() for parameter in objective.parameters()]
    assert norms[0] > 0 and norms[1] == 0


def test_what_an_entry_remembers_is_its_own():
    queries, documents, labels = batch([1.0, 1.0, 1.0])
    labels = labels.__class__(**{**vars(labels), "task": Task.RETRIEVAL, "in_batch": True})
    objective = build_objective({"by_task": {"sts": "pearson", "retrieval": {"type": "negative_queue", "size": 8}}}, 6)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for keeps in (objective.forget, objective.commit):
        objective.remember(objective.gather(queries, documents, labels))
        keeps()
        objective.commit()
        changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
        assert bool(changed) == (keeps == objective.commit)
        assert all(name.startswith("objectives.1.") for name in changed)


def test_the_log_has_means_over_the_steps_that_had_a_metric():
    tally = Tally()
    for metrics in ({"loss_sts": 1.0}, {"loss_retrieval": 4.0}, {"loss_sts": 3.0}):
        tally.add({name: torch.tensor(value) for name, value in metrics.items()}, 1, 1)
    kept = tally.tensors()
    again = Tally()
    again.restore([kept, kept], tally.steps, torch.device("cpu"))
    for one in (tally, again):
        found = one.take()
        assert (found["loss_sts"], found["loss_retrieval"]) == (2.0, 4.0)
