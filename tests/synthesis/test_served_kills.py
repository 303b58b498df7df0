"""The real thing: vLLM's server, started by the command, which is killed again and again.

MMEMBED_KILLS=10 MMEMBED_QUERIES=500 python -m pytest -s tests/synthesis/test_served_kills.py     the whole evidence
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mmembed.data.records import parse_record
from tests.synthesis.conftest import ENGINE

ROOT = Path(__file__).parents[2]
KILLS, QUERIES = int(os.environ.get("MMEMBED_KILLS", 2)), int(os.environ.get("MMEMBED_QUERIES", 24))
AT_WORK = 20.0  # seconds after its first new answer within which a life is killed


@pytest.mark.vllm
@pytest.mark.slow
def test_passages_of_a_real_server_survive_kills(tmp_path, need_vllm):
    """Every query has its passages at four levels, no id stands twice, and no answer was asked for twice."""
    lines = (ROOT / "data/squad-en/queries.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "queries.jsonl").write_text("".join(lines[:QUERIES]), encoding="utf-8")
    serve = {"options": {**ENGINE, "max_model_len": 1536, "max_num_seqs": 64}}
    stage = {"type": "graded_passages", "min_words": 2, "max_words": 12, "max_tokens": 640, "temperature": 1.0}
    config = {
        "output": str(tmp_path / "out"), "sources": [{"path": str(tmp_path / "queries.jsonl"), "kind": "queries"}],
        "generator": {"type": "openai", "model": "mmembed-nano", "serve": serve, "concurrency": 64},
        "stages": [stage], "attempts": 20,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "data_tools.synthesize", "--config", str(tmp_path / "config.yaml")]
    answers, draw, kept = tmp_path / "out/work/answers.jsonl", random.Random(0), []
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        before = _lines(answers)
        while process.poll() is None and _lines(answers) == before:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, AT_WORK * min(1.0, QUERIES / 500)))
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(_lines(answers))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\nanswers that each of {KILLS} killed lives left: {kept}\n{done.stdout}")
    assert kept == sorted(kept)
    records = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert Counter(one["id"] for one in records) == Counter(json.loads(line)["_id"] for line in lines[:QUERIES])
    for record in records:
        assert [one.relevance for one in parse_record(record, "here").documents] == [3, 2, 1, 0]
    keys = Counter(json.loads(line)["key"] for line in answers.read_text().splitlines())
    assert max(keys.values()) == 1


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
