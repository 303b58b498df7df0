"""What is asked of a backbone before its weights are loaded gives the answers of the loaded one."""

import pytest
import torch
from families import FAMILIES

from mmembed.backbones import load_backbone
from mmembed.backbones.adapters import lora_targets
from mmembed.backbones.loading import outline_backbone
from mmembed.config import build_config
from mmembed.errors import ConfigError
from mmembed.training.preflight import preflight


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_has_the_layers_and_the_processor_of_the_backbone(family_folder, family):
    folder = str(family_folder(family))
    loaded, outline = load_backbone(folder), outline_backbone(folder)
    names, expected = ({name for name, _ in one.model.named_modules()} for one in (outline, loaded))
    assert names == expected
    assert {parameter.device for parameter in outline.model.parameters()} == {torch.device("meta")}
    assert type(outline.family) is type(loaded.family)
    assert type(outline.processor) is type(loaded.processor)
    for targets in ("auto", "all-linear"):
        assert lora_targets(outline, targets, {"vision"}) == lora_targets(loaded, targets, {"vision"})


def test_a_backbone_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="model.name_or_path: cannot load"):
        preflight(build_config({"model": {"name_or_path": str(tmp_path / "nowhere")}}))
