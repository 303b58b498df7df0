"""The benchmark of one GPU, as a whole and in small on the CPU; and the arithmetic of its utilisation."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PEAK_FLOPS, ROWS, Scale, _progress, _row_of, _Runner, _useful
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


def side(pairs, seconds, loss, **more):
    return {"setting": "s", "pairs": pairs, "seconds_a_step": seconds, "first_loss": loss, "peak_mb": 1, **more}


def test_a_row_of_what_is_known():
    useful = PEAK_FLOPS / 2
    ours = side(8, 2.0, 5.0, tokens=100, useful_flops=useful, useful_flops_unshared=2 * useful)
    row = _row_of("name", {"ours": ours})
    assert (row.ours, row.peer, row.ratio_to_peer, row.meets) == (4.0, None, None, False)
    assert row.details["ours"]["tokens_per_second"] == 50 and row.details["ours"]["mfu"] == 0.25
    row = _row_of("name", {"ours": ours, "peer": side(8, 4.0, 5.01)})
    assert (row.ours, row.peer, row.ratio_to_peer, row.meets) == (4.0, 2.0, 2.0, True)
    assert row.details["peer"]["tokens_per_second"] == 25 and row.details["peer"]["mfu"] == 0.25
    assert not _row_of("name", {"ours": ours, "peer": side(8, 4.0, 5.1)}).meets
    row = _row_of("name", {"ours": ours, "peer": side(4, 4.0, 5.0)})  # of a short step: other pairs, another loss
    assert (row.peer, row.meets, row.details["peer"]["tokens_per_second"]) == (1.0, False, 12)
    row = _row_of("name", {"peer": side(8, 4.0, 5.0)})
    assert (row.ours, row.peer, row.meets) == (None, 2.0, False)


@pytest.mark.parametrize(
    ("end", "message"),
    [("time.sleep(60)", "x was ended after 1.5 s"), ("sys.exit(3)", "x ended with 3"), ("", None)],
)
def test_a_process_that_does_not_end_well_leaves_what_it_said(tmp_path, monkeypatch, end, message):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    scale = Scale(True, "cpu", 1, 24, 1, limit=1.0)
    answers = "".join(f"print('answer: {{\"steps\": {number}}}', flush=True); print('a log');" for number in (1, 2))
    for said in (answers, ""):
        runner = _Runner(SimpleNamespace(in_process=False), scale, tmp_path)
        command = [sys.executable, "-c", f"import sys, time; print('begun', flush=True); {said} {end}"]
        runner.waiting["x"] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        heard = []
        if said:
            found = runner._answer("x", heard.append)
            assert found == {"steps": 2, **({} if message is None else {"ended_by": message})}
            assert heard == [{"steps": 1}, {"steps": 2}]
        else:
            with pytest.raises(RuntimeError, match=message or "x said nothing"):
                runner._answer("x", heard.append)


def test_no_step_begins_that_would_not_end_in_time():
    told = []
    control = SimpleNamespace(should_training_stop=False)
    left = 5.0
    callback = _progress(lambda: told.append(1), SimpleNamespace(seconds=[9.0, 4.0]), lambda: left)
    callback.on_step_end(None, None, control)
    assert not control.should_training_stop
    callback.on_log(None, None, control, logs={"loss": 1.0})
    callback.on_log(None, None, control, logs={"train_loss": 1.0})
    assert len(told) == 1
    left = 3.0
    callback.on_step_end(None, None, control)
    assert control.should_training_stop
