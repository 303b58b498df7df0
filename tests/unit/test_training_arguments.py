"""The `training` block: which metric tells the best checkpoint, and values that transformers would fail on later."""

import pytest

from mmembed.config import build_config
from mmembed.content import Task
from mmembed.errors import ConfigError
from mmembed.training.arguments import one_device, training_arguments, with_metric
from mmembed.training.evaluation import metric_names


class Dev:
    """A dev source as far as its metrics go."""

    def __init__(self, name, task):
        self.name, self.tasks = name, {task}


@pytest.mark.parametrize(
    ("tasks", "metric"),
    [
        ([Task.STS], "eval_spearman"),
        ([Task.RETRIEVAL], "eval_ndcg_at_10"),
        ([Task.STS, Task.RERANKING], "eval_ndcg_at_10"),
    ],
)
@pytest.mark.parametrize(
    "training",
    [
        {"early_stopping_patience": 2},
        {"load_best_model_at_end": True, "save_strategy": "steps"},
        {"save_strategy": "best"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ],
    ids=str,
)
def test_best_goes_by_what_the_dev_sources_hold(tmp_path, tasks, metric, training):
    sources = [{"path": f"{task.value}.jsonl"} for task in tasks]
    training = {"eval_strategy": "steps", "output_dir": str(tmp_path), **training}
    config = build_config({"data": {"dev": sources}, "training": training})
    args = with_metric(training_arguments(config), config, [Dev(task.value, task) for task in tasks])
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is True


def test_names_of_metrics_are_those_of_the_evaluation():
    names = metric_names({"a": {Task.STS}, "b": {Task.RETRIEVAL}})
    assert set(names) == {"a_spearman", "b_ndcg_at_10", "b_recall_at_10", "spearman", "ndcg_at_10", "recall_at_10"}


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("lr_scheduler_type", "cosin", "cosine"),
        ("save_strategy", "step", "steps"),
        ("optim", "adamw_torc", "adamw_torch"),
    ],
)
def test_a_misspelt_choice_names_its_key_and_the_nearest(key, value, meant):
    with pytest.raises(ConfigError, match=f"training.{key}: there is no '{value}'; did you mean '{meant}'"):
        training_arguments(build_config({"training": {key: value}}))


def test_one_process_trains_on_one_device(tmp_path, caplog):
    """transformers would wrap the model in DataParallel, and multiply the batch by the devices."""
    args = training_arguments(build_config({"training": {"output_dir": str(tmp_path)}}))
    args._n_gpu = 4
    one_device(args)
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size
    assert "4 devices are visible" in caplog.text
