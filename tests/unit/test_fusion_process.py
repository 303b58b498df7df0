"""Fusion in processes of its own: what it takes of memory, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import CHATML, _ids, build, make_tokenizer

from mmembed.fusion.fuse import fuse
from mmembed.models.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAYERS, MEGABYTE = 12, 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two whole models of 150 MB in float32, tensors of at most 3 MB."""
    root = tmp_path_factory.mktemp("large")
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = CHATML
    config = tf.Qwen3Config(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, max_position_embeddings=512, tie_word_embeddings=True, **_ids(tokenizer),
    )  # fmt: skip
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(root / "start")
    tokenizer.save_pretrained(root / "start")
    model, preprocessor = build(root / "start", adapter=None)
    for name in ("a", "b"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        save_checkpoint(root / name, model, preprocessor)
    return root


MEASURE = """
import json, resource, sys
from mmembed.fusion.fuse import fuse
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
from mmembed.fusion.sources import open_source
open_source(sys.argv[1])
before = peak()
fuse(sys.argv[1:3], sys.argv[3], "delta_guided", max_shard_size="8MB")
print(json.dumps([before, peak()]))
"""


def test_memory_is_that_of_a_shard_not_of_a_model(models):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(models / "a"), str(models / "b"), str(models / "fused")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in (models / "fused").glob("model-*.safetensors")) / MEGABYTE
    assert size > 140 and len(list((models / "fused").glob("model-*"))) > 15
    assert after - before < 50, f"{after - before:.0f} MB more for models of {size:.0f} MB"  # two shards, six tensors


def test_a_kill_leaves_no_half_model_and_the_next_fusion_sweeps(models):
    output = models / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmembed", "fuse", str(models / "a"), str(models / "b"), "--max-shard-size", "4MB",
         "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    give_up = time.monotonic() + 300
    while not list(models.glob(".killed.*/model-00003-of-*")) and time.monotonic() < give_up:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and list(models.glob(".killed.*"))
    fuse([models / "a", models / "b"], output)
    assert (output / "mmembed.json").is_file() and not list(models.glob(".killed.*"))
