"""Retrieval and graded pairs in one run: batches alternate by the rule, each with the objective of its task."""

import json

import pytest

from mmembed.config import load_config
from recipes.train_embedder import main
from tests.recipes.test_configs import ROOT
from tests.runs import build_trainer, in_two_processes

SOURCES = [{"path": "text.jsonl", "name": "text"}, {"path": "sts.jsonl", "name": "pairs", "batch_size": 4}]
BOTH = [
    f"data.train={json.dumps(SOURCES)}",
    "data.dev=[{path: sts.jsonl, name: dev}]",
    "data.mixing=round_robin",
    "objective={by_task: {retrieval: {type: infonce, temperature: 0.1}, "
    "sts: [{type: pearson, weight: 2}, {type: pro, weight: 0.5}, {type: rank_kl, weight: 5}]}}",
    "adapter.dropout=0.0",
]


def run(config_file, *overrides):
    return main(["--config", str(config_file), *BOTH, *overrides])


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_tasks_take_turns_and_are_logged_apart(config_file, tmp_path, capsys):
    assert run(config_file) == 0
    report = capsys.readouterr().out
    assert "pairs: 8 records (sts), 3 of 7 batches an epoch of 4 queries, graded pairs" in report
    assert "batch: 4 or 8 queries x 1 processes" in report
    log = log_of(tmp_path / "out")
    for place, (entry, task) in enumerate(zip(log, ["retrieval", "sts"] * 2, strict=True)):
        assert entry[f"loss_{task}"] == entry["loss"], place
        assert {"loss_retrieval", "loss_sts"} - {f"loss_{task}"} - entry.keys(), place
        assert {"effective_rank", "score_gap", "grad_norm_adapter"} <= entry.keys()
    parts = log[1]
    total = 2 * parts["loss_pearson"] + 0.5 * parts["loss_pro"] + 5 * parts["loss_rank_kl"]
    assert parts["loss_sts"] == pytest.approx(total, abs=1e-4)
    assert parts["pairs"] == 4
    assert "final_dev_spearman" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_stop_changes_nothing(config_file, tmp_path, stop_in_step):
    """Between two logs, so that the sums of each task have to come back."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    logged = ["training.logging_steps=4", "training.save_strategy=steps", "training.save_steps=100"]
    assert run(config_file, *logged, f"training.output_dir={once}") == 0
    stop_in_step(3)
    assert run(config_file, *logged, f"training.output_dir={twice}") == 75
    assert run(config_file, *logged, f"training.output_dir={twice}") == 0
    whole, stopped = log_of(once)[-1], log_of(twice)[-1]
    for name in ("loss", "loss_retrieval", "loss_sts", "correlation"):
        assert whole[name] == stopped[name], name
    assert whole["loss"] == pytest.approx(
        (whole["loss_retrieval"] + 2 * whole["loss_sts"]) / 3, abs=1e-4
    )  # steps 2 to 4


def test_going_on_with_other_processes_keeps_the_batches(config_file, tmp_path, stop_in_step, capsys):
    """The rows of each source's batch have to stay together: two processes take half of them each."""
    one, two = tmp_path / "one", tmp_path / "two"
    saved = ["training.save_strategy=steps", "training.save_steps=100"]
    assert run(config_file, *saved, f"training.output_dir={one}") == 0
    stop_in_step(2)
    assert run(config_file, *saved, f"training.output_dir={two}") == 75
    capsys.readouterr()
    assert run(config_file, *saved, f"training.output_dir={two}", "data.train.1.batch_size=8") == 2
    assert "a batch of 'pairs' had 4 rows" in capsys.readouterr().err
    halves = ["training.per_device_train_batch_size=4", "data.train.1.batch_size=2"]
    arguments = ["--config", str(config_file), *BOTH, *saved, f"training.output_dir={two}", *halves]
    in_two_processes("recipes.train_embedder", *arguments)
    found, expected = log_of(two)[2], log_of(one)[2]
    assert found["step"] == 3 and "loss_retrieval" in found
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-4)  # of all processes


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective=pearson"], "'text' (retrieval): objective 'pearson' is for graded pairs"),
        (["objective={by_task: {retrieval: infonce}}"], "'pairs': objective.by_task has no entry for task 'sts'"),
        (["objective={by_source: {pairs: pearson}}"], "'text': objective.by_source has no entry for it"),
        (
            ["objective={by_source: {pairs: pearson, txt: infonce}}"],
            "no source 'txt' in data.train; did you mean 'text'",
        ),
        (["data.mixing=proportional", "data.mixing_alpha=0.3"], "mixing_alpha has no effect with mixing"),
        (["data.train.0.weight=2"], "weight 2 of 'text' has no effect"),
        (["data.dev.0.batch_size=2"], "'dev': batch_size acts in training only"),
        (["data.train.1.batch_size=1"], "'pairs': one query a batch and process"),
    ],
)
def test_what_cannot_be_is_refused(config_file, overrides, named, capsys):
    assert run(config_file, *overrides) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(("rule", "expected"), [("proportional", (5, 2)), ("round_robin", (4, 3))])
def test_rules_of_alternation(config_file, rule, expected):
    """40 records in batches of 8, 8 in batches of 4."""
    trainer = build_trainer(load_config(config_file, [*BOTH, f"data.mixing={rule}"]))
    assert trainer.plan.batches_per_source == expected


def test_codiemb_trains_the_nano_on_the_shipped_data(tmp_path):
    file = ROOT / "recipes" / "configs" / "embedder" / "codiemb.yaml"
    overrides = ["data.train.0.batch_size=8", "data.train.1.batch_size=8", "data.dev=[]", "training.max_steps=6"]
    overrides += [
        "data.mixing=round_robin",
        "training.logging_steps=3",
        f"training.output_dir={tmp_path / 'out'}",
        f"data.root={ROOT / 'data'}",
    ]
    assert main(["--config", str(file), *overrides, "training.disable_tqdm=true"]) == 0
    log = log_of(tmp_path / "out")
    tasks = {name for entry in log for name in entry if name in ("loss_retrieval", "loss_sts")}
    assert tasks == {"loss_retrieval", "loss_sts"}
    assert any("anchors" in entry for entry in log)
