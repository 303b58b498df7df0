"""Rounds of mining and training as one command: each mines with the last one's embedder, and a stop loses none."""

from __future__ import annotations

import json

import numpy as np
from safetensors.torch import load_file
from test_refresh_run import MINING, RUN, mined_at
from test_resume import same

from recipes.train_rounds import main

ONCE = MINING.replace(", every: 2", "")
SHORT = [*RUN, ONCE, "training.max_steps=3", "training.save_strategy=steps", "training.save_steps=1"]


def rounds(config_file, folder, *more: str) -> int:
    return main(["--config", str(config_file), "--rounds", "2", *SHORT, f"training.output_dir={folder}", *more])


def test_a_round_begins_where_the_one_before_ended_and_mines_with_it(config_file, tmp_path, stop_in_step, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert rounds(config_file, whole) == 0
    first, second = whole / "round-1", whole / "round-2"
    run = json.loads((second / "training_run.json").read_text())["config"]
    assert run["model"]["name_or_path"] == str(first)
    assert not np.array_equal(mined_at(first, 3), mined_at(second, 3)), "another model has mined"
    assert np.array_equal(mined_at(second, 1), mined_at(second, 3)), "once a round"

    stop_in_step(2, 2)  # in the first round, and when that was gone on with, in the second one
    assert [rounds(config_file, stopped) for _ in range(3)] == [75, 75, 0]
    for name in ("round-1", "round-2"):
        pair = [load_file(folder / name / "adapter_model.safetensors") for folder in (whole, stopped)]
        assert same(*pair), name
    before = (second / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert rounds(config_file, whole, "training.logging_steps=3") == 0
    assert (second / "adapter_model.safetensors").stat().st_mtime_ns == before, "nothing is left to do"
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        f"round 1 of 2 was done before: {first}",
        f"round 2 of 2 was done before: {second}",
        f"the result: {second}",
    ]
    refused_where_a_finished_round_was_another(config_file, whole, capsys)


def refused_where_a_finished_round_was_another(config_file, whole, capsys) -> None:
    """By setting, batch and record; a round that is not there yet does not hide those that are."""
    for changes, said in (
        (["training.learning_rate=0.5", "training.output_dir=" + str(whole)], "training.learning_rate: "),
        (["data.mining.depth=7", "--rounds", "3"], "data.mining.depth: 8 then, 7 now"),
        (["training.per_device_train_batch_size=2"], "a batch of all sources: 8 rows then, 2 now"),
        (
            ["data.train=[{path: text.jsonl, max_examples: 39}]"],
            "data source 'text.jsonl': 40 records then, 39 records",
        ),
    ):
        assert rounds(config_file, whole, *changes) == 2
        error = capsys.readouterr().err
        assert f"{whole / 'round-1'}: is finished, under other settings:\n  " in error and said in error
        assert "output_dir:" not in error and not (whole / "round-3").exists()


def test_rounds_that_would_mine_nothing_are_refused(config_file, tmp_path, capsys):
    assert main(["--config", str(config_file), f"training.output_dir={tmp_path}"]) == 2
    assert "has no data.mining, so no round would mine" in capsys.readouterr().err
    assert rounds(config_file, tmp_path, "--rounds", "0") == 2
    assert "--rounds 0: give 1 or more" in capsys.readouterr().err
