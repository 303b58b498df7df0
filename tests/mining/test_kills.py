"""Killed at any moment, within the write of a shard too, the command goes on to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_tools.mine_negatives import main
from tests.mining.conftest import DATA, save_multi_vector

ROOT = Path(__file__).parents[2]
WRITTEN = (".jsonl", ".json", ".html", ".npz")


def written(folder):
    """The files of the output, as they are handed on."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in WRITTEN}


def run_with_kills(tmp_path, tree, lives, seed=0):
    """What each life left; both outputs."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    file = tmp_path / "mining.yaml"
    file.write_text(yaml.safe_dump(tree))
    job = {
        "seed": seed,
        "lives": lives,
        "output": str(killed),
        "arguments": ["--config", str(file), f"output={killed}"],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mining.killing", json.dumps(job)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout.splitlines()[-1])
    code = "from data_tools.mine_negatives import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--config", str(file), f"output={whole}"]
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600).returncode == 0
    assert left[-1]["status"] == 0, done.stderr[-3000:]
    return left, written(whole), written(killed)


def check(left, whole, killed, output):
    """The same bytes, nothing computed again, nothing half-written left."""
    assert {file.name for file in output.iterdir()} == {".lock", ".owner", "work", *whole}
    assert killed == whole and len(whole) >= 3
    shards = [one["shards"] for one in left]
    assert shards == sorted(shards), shards  # nothing that was complete was computed again


@pytest.mark.parametrize("what", ["plain", "stages", "late_interaction"])
def test_a_few_kills(tmp_path, texts, family_folder, what):
    """Exact search, a graph and the clusters of two stages, or a teacher of many vectors."""
    tree = {
        "root": str(texts),
        "sources": [{"path": "train.jsonl", "corpus": ["corpus.jsonl"]}],
        "retriever": {"type": "mmembed", "model": str(family_folder("qwen3_vl"))},
        "search": {"depth": 10, "queries": 8},
        "negatives": 3,
        "shard": 8,
    }
    if what == "stages":
        tree |= {"rules": ["mcl", "random_fill"], "clusters": 3}
        file, first = tmp_path / "first.yaml", str(tmp_path / "first")
        file.write_text(yaml.safe_dump(tree))
        assert main(["--config", str(file), f"output={first}", "seed=1"]) == 0
        tree |= {"earlier": [first], "search": {**tree["search"], "index": "hnsw"}}
    if what == "late_interaction":
        model = save_multi_vector(family_folder("qwen3_vl"), tmp_path / "many")
        tree |= {"retriever": "bm25", "teacher": {"type": what, "model": model}, "scores": "teacher"}
    left, whole, killed = run_with_kills(tmp_path, tree, lives=6)
    assert sum(one["killed"] for one in left) >= 3
    check(left, whole, killed, tmp_path / "killed")


@pytest.mark.slow
def test_twenty_kills_over_the_shared_data(tmp_path):
    sources = [
        {"path": name, "format": "beir", "max_examples": 60, "corpus": [f"{name}/corpus.jsonl"]}
        for name in ("mbpp", "vega-charts")
    ]
    tree = {
        "root": str(DATA),
        "sources": sources,
        "retriever": "mmembed",
        "search": {"depth": 20, "queries": 4},
        "shard": 4,
    }
    left, whole, killed = run_with_kills(tmp_path, tree, lives=20, seed=1)
    print(left)
    assert sum(one["killed"] for one in left) >= 15
    check(left, whole, killed, tmp_path / "killed")


def test_a_second_run_writes_the_same_bytes(mining, tmp_path):
    assert main(["--config", str(mining())]) == 0
    first = written(tmp_path / "out")
    assert main(["--config", str(mining())]) == 0
    assert written(tmp_path / "out") == first
