"""The benchmark of objectives, in small: every one of them runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from benchmarks.objectives import contenders, names
from tests.runs import ROOT


@pytest.mark.parametrize("name", names())
def test_every_objective_has_a_batch_that_it_takes(name: str) -> None:
    runs = contenders(name, queries=32, documents=256, size=16, device="cpu")
    assert math.isfinite(runs["ours"]())
    assert math.isfinite(runs["limit"]())


def test_rows_have_a_ratio_and_a_peak() -> None:
    options = ["--queries", "8", "--documents", "64", "--size", "16", "--rounds", "1", "--only", "dcl", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.objectives", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["name"] == "dcl_8x64x16_cpu"
    assert row["ratio_to_limit"] > 0 and row["goal_to_limit"] == 0.333 and 0 < row["peak_mb_ours"] < 8192
