"""Killed at any moment, a pipeline goes on to the same bytes and asks for nothing twice."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 8  # of the scripted generator


def run(tmp_path, name, lives, seed):
    output, log = tmp_path / name, tmp_path / f"{name}.log"
    job = {
        "seed": seed, "lives": lives, "output": str(output), "log": str(log),
        "arguments": ["--config", str(tmp_path / "config.yaml"), f"output={output}"],
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.synthesis.killing", json.dumps(job)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), output, log.read_text().split(), done.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pipeline_survives_kills_at_any_moment(tmp_path, write_lines, seed):
    queries = write_lines("queries.jsonl", [{"_id": f"q{number}", "text": f"query {number}"} for number in range(150)])
    stages = [{"type": "graded_passages"}, {"type": "graded_passages", "keep_documents": True, "levels": [2, 1]}]
    config = {"output": "", "sources": [{"path": queries, "kind": "queries"}], "generator": "scripted"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "stages": stages, "attempts": 2, "max_lost": 0.5}))
    _, whole, asked_whole, _ = run(tmp_path, "whole", 0, seed)
    left, killed, asked, errors = run(tmp_path, "killed", 18, seed)
    assert left[-1]["status"] == 0, errors
    assert sum(one["killed"] for one in left) >= 8, left  # on a fast machine some lives reach the end
    for name in ("records.jsonl", "left_out.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    made = [json.loads(line)["id"] for line in (killed / "records.jsonl").read_text().splitlines()]
    assert len(made) == len(set(made)) > 100
    answers = [one["answers"] for one in left]
    assert answers == sorted(answers), answers  # none is ever lost
    stored = (killed / "work" / "answers.jsonl").read_text().splitlines()
    keys = Counter(json.loads(line)["key"] for line in stored)
    assert max(keys.values()) == 1 and set(keys) == set(asked_whole)
    assert len(asked_whole) == len(set(asked_whole)) == len(keys)
    assert len(asked) - len(keys) <= IN_FLIGHT * sum(one["killed"] for one in left)  # in flight when it died
