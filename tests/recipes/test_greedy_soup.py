"""A greedy soup through the real commands: what scores is `python -m eval.run`, in processes of its own."""

import json

import pytest
import torch
from families import build

from mmembed.cli import main
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint

LORA = {"type": "lora", "r": 2, "alpha": 2, "dropout": 0.0, "target_modules": "auto"}

pytestmark = pytest.mark.slow  # three evaluations, each in a process that imports mteb


def test_a_model_that_harms_stays_out(tmp_path, capsys):
    """One model is the nano as it is, the other one is damaged beyond use, and comes first."""
    for name, damage in (("damaged", 0.3), ("good", 0.0)):
        torch.manual_seed(0)
        model, preprocessor = build("mmembed-nano", adapter=LORA, dtype="float32")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * damage)
        save_checkpoint(tmp_path / name, model, preprocessor)
    models, output = [str(tmp_path / name) for name in ("damaged", "good")], tmp_path / "soup"
    arguments = ["--greedy", "--tasks", "mbpp", "--limit", "40", "--output", str(output)]
    assert main(["fuse", *models, *arguments]) == 0, capsys.readouterr().err
    told = json.loads((output / "fusion.json").read_text())
    greedy = told["greedy"]
    assert greedy["order"] == [1, 0] and greedy["chosen"] == [1] and greedy["tasks"] == ["mbpp"]
    assert greedy["alone"][1] == greedy["score"] > max(greedy["tried"][0], greedy["alone"][0])
    assert [one["path"] for one in told["models"]] == models[1:]
    fused, nano = load_checkpoint(output)[0], load_checkpoint("mmembed-nano", dtype="float32")[0]
    assert all(torch.equal(one, two) for one, two in zip(fused.parameters(), nano.parameters(), strict=True))
    assert main(["fuse", models[0], "--greedy", "--output", str(tmp_path / "one")]) == 2
    assert "give at least two" in capsys.readouterr().err
