"""The benchmark of one GPU, as a whole and in small on the CPU; and the arithmetic of its utilisation."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import ROWS, _useful
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from tests.runs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [(["--in-process"], ROWS), (["--only", "qwen3_0.6b_text", "plan_memory"], ("qwen3_0.6b_text", "plan_memory"))],
    ids=["all rows", "processes"],
)
def test_every_row_runs_in_small(tmp_path, options, names):
    pytest.importorskip("sentence_transformers")
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", "--tiny", "--threads", "1", "--output", str(file)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == list(rows.values())
    assert set(rows) == set(names)
    for name, row in rows.items():
        assert "error" not in row["details"], done.stderr[-3000:]
        assert row["ours"] > 0
        if name != "plan_memory":  # the plan counts a device's memory, here all of the process was measured
            assert row["meets"] and row["peer"] > 0


def test_it_says_that_there_is_no_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch sees no CUDA device here; --tiny" in done.stderr


def test_useful_operations_are_those_of_the_matrices(family_folder):
    """Counted by torch over a forward pass: 2 N a token and the attention, a third of what a step counts. torch counts
    all of the attention matrix, of which a causal decoder needs half."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = EmbedderSettings(str(family_folder("qwen3")), dtype="float32", attn_implementation="eager")
    model, _ = build_from_settings(settings)
    length = 48
    text = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone(input_ids=torch.ones(3, length, dtype=torch.long))
    whole = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * length**2 * 3
    norms = sum(one.numel() for one in model.parameters() if one.ndim == 1)  # multiply, but not as matrices
    expected = counter.get_total_flops() - whole / 2 + 2 * norms * 3 * length
    assert _useful(model, [length] * 3, [], trained=True) / 3 == pytest.approx(
        expected, rel=1e-4
    )  # but for the angles of the positions
