"""Two processes under DeepSpeed follow the trajectory of one process without it, at ZeRO stages 1 and 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_embedder import main
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]
pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stage(config_file, tmp_path, stage):  # noqa: F811
    exact = ["adapter.dropout=0.0", "data.dev=[]"]
    assert main(["--config", str(config_file), *exact, f"training.output_dir={tmp_path / 'one'}"]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "recipes.train_embedder"]
    overrides = ["training.per_device_train_batch_size=4", f"training.output_dir={tmp_path / 'two'}"]
    overrides.append(f"training.deepspeed={ROOT / 'recipes' / 'deepspeed' / f'zero{stage}.json'}")
    done = subprocess.run(
        [*command, "--config", str(config_file), *exact, *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name].float(), tensor, atol=2e-3), name
