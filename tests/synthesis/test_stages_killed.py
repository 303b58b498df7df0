"""A run of several stages that is killed with SIGKILL again and again asks nothing twice and makes the same bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from tests.synthesis.killing_stages import keys_kept

ROOT = Path(__file__).parents[2]
MADE = ("records.jsonl", "left_out.jsonl")


def test_a_killed_run_asks_nothing_twice_that_was_answered(tmp_path):
    tree = {
        "output": "set below",
        "root": str(ROOT / "data"),
        "sources": [{"path": "openstax-glossary/corpus.jsonl", "kind": "documents", "max_examples": 30}],
        "generator": "dying",
        "stages": [
            {"type": "queries", "types": ["question"], "per_document": 2},
            {"type": "retrieve", "corpus": "openstax-glossary/corpus.jsonl", "depth": 3},
            {"type": "judge", "samples": 2, "positive_from": 3},
        ],
        "attempts": 2,
        "max_lost": 0.5,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    draw, killed, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    deaths = [draw.randrange(2, 25) * 2 + place % 2 for place in range(6)] + [draw.randrange(60, 90) * 2, 0]
    job = [*((str(killed), death) for death in deaths), (str(whole), 0)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.synthesis.killing_stages", str(file), str(tmp_path / "log"), json.dumps(job)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout)
    assert [status for status, _ in ends] == [-9] * 7 + [0, 0], done.stderr[-3000:]
    counts = [len(kept) for _, kept in ends[:-1]]
    assert counts == sorted(counts) and counts[-1] > 100
    for number, (_, kept) in enumerate(ends):
        asked = (tmp_path / f"log.{number}").read_text().split()
        assert len({*kept}) == len(kept) and len({*asked}) == len(asked) and not {*asked} & {*kept}
    assert {*keys_kept(whole)} == {*keys_kept(killed)} == {*asked}
    for name in MADE:
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    records = [json.loads(line) for line in (whole / "records.jsonl").read_text().splitlines()]
    assert len(records) > 40 and all(len(record["documents"]) > 1 for record in records)
    one, other = (json.loads((output / "summary.json").read_text()) for output in (whole, killed))
    assert one["asked"] == other["asked"]
    for mine, theirs in zip(one["stages"], other["stages"], strict=True):
        for key in ("in", "out", "left_out", "lost", "reasons", "unusable", "notes"):
            assert mine[key] == theirs[key]
