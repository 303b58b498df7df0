"""Claims through the real commands: stopped in between, gone on with, and the page at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eval.claims.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
CLAIM = """
paper: "A paper, arXiv 0000.00000"
sentence: {sentence}
base: {{data: {{train: [{{path: mbpp, format: beir}}]}}, training: {{per_device_train_batch_size: 4, warmup_steps: 0}}}}
arms:
  one: {{objective: {{type: infonce, temperature: 0.05}}}}
  other: {{objective: {{type: dcl, temperature: 0.05}}}}
comparisons:
{comparisons}
"""

pytestmark = pytest.mark.slow  # a run starts two processes that import torch, or mteb


def test_a_stopped_table_goes_on_with_what_is_missing(tmp_path, capsys):
    claims, work, table = tmp_path / "claims", tmp_path / "work", tmp_path / "page.md"
    claims.mkdir()
    vectors = "  - {arm: one, than: other, task: mbpp, metric: pooled_auc}\n  - {arm: one, than: other, task: mbpp}"
    cut = "  - {arm: one, than: other, task: mbpp, dim: 8, direction: not_lower}"
    (claims / "a.yaml").write_text(CLAIM.format(sentence="a sentence", comparisons=vectors))
    (claims / "b.yaml").write_text(CLAIM.format(sentence="another sentence", comparisons=cut))
    arguments = ["--claims", str(claims), "--work", str(work), "--seeds", "1", "--budget", "2", "--write", str(table)]

    process = subprocess.Popen([sys.executable, "-m", "eval.claims", *arguments], cwd=ROOT, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    started = work / "a" / "other" / "seed-0" / "training.log"
    give_up = time.monotonic() + 300
    while not started.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    # 130, or death by SIGINT, which a shell shows as 130: Python chooses that where the interrupt came while it made
    # a dataclass or a named tuple of a module that is being imported
    assert process.wait(30) in (130, -signal.SIGINT)
    assert [json.loads(path.read_text())["arm"] for path in work.glob("results/*.json")] == ["one"]
    time.sleep(0.5)
    left = [found for found in psutil.process_iter(["cmdline"]) if str(work) in " ".join(found.info["cmdline"] or [])]
    assert not left, "a training runs on"
    (first,) = work.glob("results/*.json")
    written = first.stat().st_mtime_ns

    assert main([*arguments, "--jobs", "2"]) == 0
    assert first.stat().st_mtime_ns == written
    kept = [json.loads(path.read_text()) for path in work.glob("results/*.json")]
    results = {(result["claim"], result["arm"]): result for result in kept}
    assert len(results) == len(kept) == 4
    assert "1 of 2 runs are there" in capsys.readouterr().out
    result = results["a", "other"]
    assert result["config"]["training"]["max_steps"] == 2
    numbers = result["scores"]["mbpp"]
    assert 0.5 < numbers["pooled_auc"] < 1 and 0 < numbers["centroid_distance"] < 2 and 0.1 < numbers["ndcg_at_10"] < 1
    cut_scores = results["b", "one"]["scores"]
    assert cut_scores["mbpp@8"]["ndcg_at_10"] < cut_scores["mbpp"]["ndcg_at_10"]
    assert not list(work.rglob("*.safetensors"))
    text = table.read_text()
    assert "inconclusive: 1 seed" in text and "4 runs" in text and "mbpp at 8 dimensions" in text
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"a.svg", "b.svg", "results.jsonl"}

    assert main([*arguments, "--no-runs"]) == 0  # nothing is missing, nothing is run
    assert first.stat().st_mtime_ns == written and table.read_text() == text
    shutil.rmtree(work)
    assert main([*arguments, "--no-runs"]) == 0  # the results beside the page
    assert table.read_text() == text


def test_a_failed_run_does_not_stop_the_others_and_says_where_its_log_is(tmp_path, capsys):
    claims = tmp_path / "claims"
    claims.mkdir()
    comparison = "  - {arm: one, than: other, task: mbpp}"
    text = CLAIM.format(sentence="a sentence", comparisons=comparison).replace(
        "temperature: 0.05}}\n  other", "temperature: 0}}\n  other"
    )
    (claims / "a.yaml").write_text(text)
    assert main(["--claims", str(claims), "--work", str(tmp_path / "work"), "--seeds", "1", "--budget", "1"]) == 1
    shown = capsys.readouterr()
    assert "failed: a: one, seed 0, training: exit status 2" in shown.err and "training.log" in shown.err
    assert "temperature" in shown.err  # what the command said
    (kept,) = (tmp_path / "work/results").iterdir()
    assert json.loads(kept.read_text())["arm"] == "other"


RERANKER = """
paper: "A paper, arXiv 0000.00000"
sentence: A reranker helps.
model: reranker
stages:
  mined:
    command: mine
    config:
      sources: [{path: mbpp, format: beir, max_examples: 30}]
      retriever: bm25
      search: {depth: 5}
      rules: [top_k]
      negatives: 1
base:
  data: {root: "{mined}", train_group_size: 2, train: [{path: mbpp.jsonl}]}
  training: {per_device_train_batch_size: 4, warmup_steps: 0}
arms:
  sft: {objective: sft}
first_stages: {bm25: bm25}
depth: 2
comparisons:
  - {arm: sft, than: first_stage, candidates: bm25, task: mbpp}
"""


def test_rerankers_are_trained_on_what_a_stage_mined_and_measured_on_fixed_candidates(tmp_path, capsys):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "a.yaml").write_text(RERANKER)
    work, table = tmp_path / "work", tmp_path / "page.md"
    options = ["--seeds", "1", "--budget", "1", "--write", str(table)]
    assert main(["--claims", str(tmp_path / "claims"), "--work", str(work), *options]) == 0
    (result,) = [json.loads(path.read_text()) for path in work.glob("results/*.json")]
    first, ranked = (result[key]["mbpp@bm25"] for key in ("first_stage", "scores"))
    assert 0 < first["p_at_1"] <= first["ndcg_at_10"] and ranked["ndcg_at_10"] != first["ndcg_at_10"]
    assert ranked["mrr"] >= first["mrr"] / 2, "the same two candidates in another order"
    assert len(result["candidates"]["mbpp@bm25"]) == 16 and {"stages", "training", "measuring"} == set(
        result["seconds"]
    )
    assert "mbpp of candidates from bm25" in table.read_text() and "inconclusive: 1 seed" in table.read_text()
    assert not list((work / "a").rglob("*.safetensors"))
