"""Two processes under DeepSpeed follow the trajectory of one process without it, at ZeRO stages 1 and 2."""

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_embedder import main
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import ROOT, in_two_processes, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stage(config_file, tmp_path, stage):  # noqa: F811
    exact = ["adapter.dropout=0.0", "data.dev=[]"]
    assert main(["--config", str(config_file), *exact, f"training.output_dir={tmp_path / 'one'}"]) == 0
    overrides = ["training.per_device_train_batch_size=4", f"training.output_dir={tmp_path / 'two'}"]
    overrides.append(f"training.deepspeed={ROOT / 'recipes' / 'deepspeed' / f'zero{stage}.json'}")
    in_two_processes("recipes.train_embedder", "--config", str(config_file), *exact, *overrides, timeout=600)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name].float(), tensor, atol=2e-3), name
