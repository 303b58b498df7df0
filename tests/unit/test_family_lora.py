"""LoRA on every family: it comes back from disk, merges, and leaves the vision tower alone."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build, items, vectors

from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.verification import verify_checkpoint

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_reloads_merges_and_leaves_vision_alone(name, family_folder, tmp_path) -> None:
    model, preprocessor = build(family_folder(name), adapter=LORA, prompt="instruct", attention="bidirectional")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.3)
    towers = {model.parameter_towers()[key] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert towers == {"language"}
    adapted = vectors(model, preprocessor, items(name))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) < 1e-6
    reloaded, loaded_preprocessor = load_checkpoint(tmp_path / "saved")
    assert torch.allclose(adapted, vectors(reloaded, loaded_preprocessor, items(name)), atol=1e-6)
    reloaded.backbone = reloaded.backbone.merge_and_unload()
    assert torch.allclose(adapted, vectors(reloaded, loaded_preprocessor, items(name)), atol=1e-4)
    bare, bare_preprocessor = build(family_folder(name), prompt="instruct", attention="bidirectional")
    assert (adapted - vectors(bare, bare_preprocessor, items(name))).abs().max() > 1e-2
