"""What the demo refuses before it measures anything, and the precision that it trains in."""

from pathlib import Path

import pytest
import torch

from recipes import demo


def test_a_config_that_cannot_work_ends_it_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_measured", lambda command: 1 / 0)
    assert demo.main(["--output", str(tmp_path / "run"), "training.max_stps=5"]) == 2
    assert "unknown key 'max_stps'; did you mean 'max_steps'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cpu", "faster"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_it_trains_in_bfloat16_where_that_is_faster(monkeypatch, cpu, faster):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "cpu_capabilities", lambda: cpu)
    given = demo.overrides(demo.parse(["training.bf16=false"]))
    assert ("training.bf16=true" in given) == faster
    assert given[-1] == "training.bf16=false"  # what a user says wins
    assert "training.bf16=true" not in demo.overrides(demo.parse(["--config", str(Path("other.yaml"))]))
