"""The benchmark of objectives, in small: every one of them runs, and one that does not is a row."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import objectives
from benchmarks._common import alternate
from benchmarks.objectives import Setting, built, contest, names, own_vectors, row_name
from mmembed.losses import LOSSES
from mmembed.objectives import OBJECTIVES
from tests.runs import ROOT


def test_every_loss_and_objective_has_a_row() -> None:
    assert set(names()) == set(LOSSES.classes()) | set(OBJECTIVES.classes())


@pytest.mark.parametrize("name", names())
def test_every_objective_has_a_batch_that_it_takes(name: str) -> None:
    one = contest(name, Setting(queries=32, documents=256, size=16))
    assert math.isfinite(one.runs["ours"]())
    assert math.isfinite(one.runs["limit"]())


@pytest.mark.parametrize(
    ("name", "shape", "limit"),
    [
        ("infonce", "32 queries with 256 documents", "32 and 256"),
        ("degla", "32 queries with 256 documents", "32 and 256"),
        ("supcon", "32 pairs", "32 and 32"),
        ("gram", "32 queries with 2 positives each", "32 and 32"),
        ("pro", "256 graded pairs in one row", "32 and 256"),
        ("global_local", "32 pairs of 8 vectors a side", "32 and 256"),
        ("captioning", "32 predicted tokens, a vocabulary of 256", "32 and 256"),
    ],
)
def test_the_limit_is_the_product_of_what_is_compared(name: str, shape: str, limit: str) -> None:
    one = contest(name, Setting(queries=32, documents=256, size=16))
    assert (one.shape, one.limit) == (shape, f"the product of {limit} vectors")


@pytest.mark.parametrize(
    ("name", "row", "shape"),
    [
        ("infonce", "32x256x16", "32 queries with 256 documents"),
        ("pro", "32x256x16", "256 graded pairs in one row"),
        ("global_local", "32x256x16", "32 pairs of 8 vectors a side"),
        ("supcon", "32x32x16", "32 pairs"),
        ("gram", "32x64x16", "32 queries with 2 positives each"),
        ("negative_queue", "32x32+1024x16", "32 pairs, a queue of 1,024"),
        ("mochi", "32x32+1024x16", "32 pairs, a queue of 1,024"),
        ("tcl", "32x96+2048x16", "32 queries with 3 positives each, two queues of 1,024"),
        ("mlcd", "32x32+100x16", "32 pairs, 100 of 1,000 classes"),
        ("prototypes", "32x32+64x16", "32 pairs, 64 prototypes"),
        ("proto_clip", "32x32+2x16", "32 pairs, 2 prototypes"),
    ],
)
def test_a_row_is_named_by_what_took_part(name: str, row: str, shape: str) -> None:
    setting = Setting(queries=32, documents=256, size=16)
    assert row_name(name, setting) == f"{name}_{row}_cpu"
    assert contest(name, setting).shape == shape


def test_the_drawn_classes_of_a_row_are_those_that_a_step_compares() -> None:
    setting = Setting(queries=128, documents=256, size=16)
    objective = built("mlcd", setting, Path())
    wanted = torch.zeros(objective.clusters, dtype=torch.bool)
    wanted[: len(objectives.CLASSES)] = True
    assert own_vectors(objective)[0] == len(objective._draw(wanted))


def test_the_kept_rows_are_named_by_the_shape_that_they_say() -> None:
    rows = objectives.kept(ROOT / "benchmarks" / "results" / "objectives.json").values()
    assert rows
    for row in rows:
        queries, documents, size = row["name"].rsplit("_", 2)[1].split("x")
        shape = row["details"]["shape"]
        of_pairs = re.match(r"4,096 pairs(?! of)|4,096 queries with (\d) positives each", shape)
        own = re.search(r", (two |a |)(?:queues? of )?([\d,]+)(?: of 1,000 classes| prototypes|)$", shape)
        expected = str(4096 * int(of_pairs[1] or 1) if of_pairs else 32768)
        if own and of_pairs:
            expected += f"+{int(own[2].replace(',', '')) * (2 if own[1] == 'two ' else 1)}"
        assert (queries, documents, size) == ("4096", expected, "1024"), row["name"]


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    small = ["--queries", "8", "--documents", "64", "--size", "16", "--rounds", "1", "--json", *map(str, options)]
    command = [sys.executable, "-m", "benchmarks.objectives", *small]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_row_that_does_not_run_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    done = run("--only", "no_such_loss", "dcl", "--keep", tmp_path / "rows.json")
    assert done.returncode == 1, done.stderr[-3000:]
    failed, row = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert failed["name"] == "no_such_loss_8x64x16_cpu" and failed["ours"] is None and failed["meets"] is False
    assert "there is no 'no_such_loss'" in failed["details"]["error"]
    assert row["name"] == "dcl_8x64x16_cpu"
    assert row["ratio_to_limit"] > 0 and row["goal_to_limit"] == 0.333 and 0 < row["peak_mb_ours"] < 8192
    assert row["details"]["shape"] == "8 queries with 64 documents" and "device" in row["details"]["environment"]
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert kept == [row, failed]  # by name

    again = run("--only", "no_such_loss", "dcl", "--keep", tmp_path / "rows.json", "--missing")
    assert again.returncode == 1
    assert [one["name"] for one in json.loads(again.stdout.splitlines()[-1])["rows"]] == [failed["name"]]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0] == row


def test_a_row_takes_the_place_of_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for name, speed in (("b", 1.0), ("a", 2.0), ("b", 3.0)):
        objectives.keep(objectives.Row(name, "queries/s", speed), path)
    assert [(row["name"], row["ours"]) for row in json.loads(path.read_text())["rows"]] == [("a", 2.0), ("b", 3.0)]


@pytest.mark.parametrize(
    "options", [["--documents", "20"], ["--documents", "8"], ["--missing"], ["--clock", "processor"]]
)
def test_options_without_a_meaning_are_refused(options: list[str]) -> None:
    done = run(*options)
    assert done.returncode == 1 and "objectives: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_first_contender_runs_first_and_each_round_is_counted_once(warm_up: bool) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("ours", "limit")}
    seconds = alternate(runs, 2, warm_up)
    assert order == (
        ["ours", "limit", "limit", "ours", "ours", "limit"] if warm_up else ["ours", "limit", "limit", "ours"]
    )
    assert {name: len(one) for name, one in seconds.items()} == {"ours": 2, "limit": 2}
