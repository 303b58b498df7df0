"""The `evaluation` block: tasks of the local benchmark while training, by `python -m eval.run` in a process of its own.

The data are those of the repository. Half of the time is that command's imports.
"""

import json

import pytest
from safetensors.torch import load_file
from test_resume import assert_same_outcome, command

from mmembed.benchmark_run import main_scores, run_benchmark
from mmembed.cli import main as mmembed
from mmembed.config import build_config
from mmembed.training.arguments import training_arguments, with_metric
from recipes.train_embedder import main
from recipes.train_reranker import main as train_reranker
from tests.recipes.conftest import write_reranker_config
from tests.runs import losses

SCORED = ["evaluation={tasks: [mbpp, stsb-en], limit: 10, device: cpu}", "data.dev=[]"]
EVERY = ["training.eval_strategy=steps", "training.eval_steps=2"]
SAVED = ["training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=9"]


def history(folder, key):
    """(step, value) of each log that has a key."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def test_a_run_with_a_benchmark(config_file, tmp_path, stop_in_step, capsys):
    """The command's own numbers, nothing else changed, stopped or not; the best checkpoint by one of them."""
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=stsb-en"]
    run = [*SCORED, *EVERY, *SAVED, *best, "training.save_steps=2"]
    whole, plain, stopped = (tmp_path / name for name in ("whole", "plain", "stopped"))
    assert main(command(config_file, whole, *run)) == 0
    assert "benchmark: local: mbpp, stsb-en, 10 queries of each at most; by a process of its own on cpu" in (
        capsys.readouterr().out
    )
    assert main(command(config_file, plain, "data.dev=[]", *SAVED)) == 0
    assert losses(whole) == losses(plain)

    found = {name: history(whole, f"eval_{name}") for name in ("mbpp", "stsb-en", "benchmark", "seconds")}
    assert [[step for step, _ in values] for values in found.values()] == [[2, 4]] * 4
    options = ["--tasks", "mbpp", "stsb-en", "--limit", "10", "--device", "cpu"]
    scores = main_scores(run_benchmark(whole / "checkpoint-4", tmp_path / "again.json", options))
    assert scores == {name: found[name][-1][1] for name in ("mbpp", "stsb-en")}
    assert found["benchmark"][-1][1] == sum(scores.values()) / 2
    assert found["stsb-en"][0][1] != found["stsb-en"][1][1]
    speeds = history(whole, "pairs_per_second")
    assert 8 / speeds[2][1] < found["seconds"][0][1]  # step 3, which came after an evaluation

    better, value = max(found["stsb-en"], key=lambda pair: pair[1])
    state = json.loads((whole / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (better, value)
    of_best = load_file(whole / f"checkpoint-{better}" / "adapter_model.safetensors")
    saved = load_file(whole / "adapter_model.safetensors")
    assert all((saved[name] == tensor).all() for name, tensor in of_best.items())
    assert json.loads((whole / "metrics.json").read_text())["final_stsb-en"] == value
    left = sorted(path.name for path in (whole / "evaluations").iterdir())  # the last one was not scored again
    assert left == [f"step-{step}.{end}" for step in (2, 4) for end in ("json", "log", "rows.json")]
    assert "stsb-en" in (whole / "training_report.html").read_text()

    stop_in_step(3)
    assert [main(command(config_file, stopped, *run)) for _ in range(2)] == [75, 0]
    assert_same_outcome(whole, stopped)


def test_a_reranker_with_a_benchmark(tmp_path, backbone, data):
    config = write_reranker_config(tmp_path / "run.yaml", backbone, data, tmp_path / "out")
    block = "evaluation={tasks: [dbpedia-entity/judged], limit: 1, device: cpu}"
    limits = ["lengths={query_max_length: 130, document_max_length: 20}", "training.max_steps=1"]
    assert train_reranker(["--config", str(config), block, *limits, "training.eval_strategy=epoch"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"final_dbpedia-entity_judged", "final_benchmark", "final_dev_ndcg_at_10"} <= metrics.keys()
    results = json.loads((tmp_path / "out" / "evaluations" / "step-1.json").read_text())
    assert main_scores(results) == {"dbpedia-entity/judged": metrics["final_dbpedia-entity_judged"]}


def test_a_task_that_gives_no_number(config_file, tmp_path, capsys):
    """Before the first step with eval_on_start; the folder of weights is gone all the same."""
    overrides = [*SCORED, "evaluation.tasks=[stsb-en]", "training.eval_on_start=true", "pooling=multi_vector"]
    assert main(command(config_file, tmp_path / "out", *overrides, "projection=16")) == 2
    error = capsys.readouterr().err
    assert "evaluation.tasks: 'stsb-en' gave no number: " in error
    assert "Take it out of the tasks" in error
    assert not (tmp_path / "out" / "evaluations" / "step-0").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation={tasks: [mbp]}"], "evaluation.tasks: no task 'mbp' here; did you mean 'mbpp'?"),
        (["evaluation={tasks: [mbpp], languages: [xx]}"], "evaluation.languages: no task here is in 'xx'"),
        (["evaluation={tasks: [mbpp], source: hub}"], "evaluation.source: acts on public benchmarks; local is read"),
        (["evaluation={tasks: [mbpp], data_root: nowhere}"], "nowhere: no folder of the local benchmark is there"),
        (["evaluation={benchmark: locl}"], "evaluation.benchmark: there is no 'locl'; did you mean 'local'?"),
        (["evaluation={benchmark: mmeb-v1, data_root: data}"], "evaluation.data_root: acts on local"),
        (["evaluation={tasks: [mbpp], device: gpu}"], "evaluation.device: there is no 'gpu'"),
        (["evaluation={tasks: [mbpp], device: cuda:7}"], "evaluation.device: 'cuda:7', of"),
        (
            ["evaluation={tasks: [mbpp]}", "training.metric_for_best_model=stsb-en"],
            "training.metric_for_best_model: evaluation gives no 'stsb-en'",
        ),
        (
            ["evaluation={tasks: [mbpp]}", "training.metric_for_best_model=mbp"],
            "training.metric_for_best_model: evaluation gives no 'mbp'; did you mean 'mbpp'?",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_scored_is_refused_before_weights_are_loaded(
    config_file, capsys, monkeypatch, overrides, message
):
    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mmembed.models.continuing.build_for_training", load)
    assert main(["--config", str(config_file), *EVERY, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_reranker_needs_reranking_tasks(tmp_path, backbone, data, capsys):
    config = write_reranker_config(tmp_path / "run.yaml", backbone, data, tmp_path / "out")
    assert train_reranker(["--config", str(config), *EVERY, "evaluation={tasks: [mbpp]}"]) == 2
    assert "evaluation.tasks: 'mbpp' is of text retrieval, and a reranker orders" in capsys.readouterr().err


def test_without_the_repository_there_is_no_benchmark(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmembed.benchmark_run.REPOSITORY", tmp_path)
    assert main(["--config", str(config_file), *EVERY, "evaluation={tasks: [odex]}"]) == 2
    assert f"evaluation: benchmarks need the folder eval of mmembed's repository, and {tmp_path}" in (
        capsys.readouterr().err
    )


def test_the_best_goes_by_the_mean_of_the_tasks_where_there_are_no_dev_sources(tmp_path):
    training = {"eval_strategy": "steps", "output_dir": str(tmp_path), "load_best_model_at_end": True}
    config = build_config({"evaluation": {"tasks": ["mbpp", "xquad/de"]}, "training": training})
    args = with_metric(training_arguments(config), config, [])
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_benchmark", True)
    training["metric_for_best_model"] = "eval_xquad_de"
    config = build_config({"evaluation": {"tasks": ["mbpp", "xquad/de"]}, "training": training})
    assert with_metric(training_arguments(config), config, []).metric_for_best_model == "eval_xquad_de"


def test_a_plan_says_what_it_does_not_count(config_file, capsys):
    """And plans a run whose device is not here."""
    overrides = [*EVERY, "evaluation={tasks: [mbpp], device: cuda:7}"]
    assert mmembed(["plan", "--config", str(config_file), *overrides]) == 0
    assert "memory and time of evaluations are not counted: local: mbpp; by a process of its own on cuda:7" in (
        capsys.readouterr().out
    )
