"""A mixture of experts in two processes follows one process: adapters of experts, trained routers, balance loss."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_embedder import main
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LORA = ["adapter={type: lora, r: 4, alpha: 8, dropout: 0.0, experts: true, router: true}"]
FULL = ["adapter={type: none}"]
BALANCED = "objective=[{type: infonce, temperature: 0.1}, {type: router_balance, weight: 0.1}]"


def run_of(config_file, folder, output, batch):  # noqa: F811
    """Arguments of a run of texts, in many chunks."""
    arguments = ["--config", str(config_file), f"model.name_or_path={folder}", "data.train=[{path: text.jsonl}]"]
    arguments += [BALANCED, "training.token_budget=64", "training.adam_epsilon=1", "training.learning_rate=1e-1"]
    arguments += ["training.lr_scheduler_type=constant", "training.max_grad_norm=0", "training.eval_strategy=no"]
    return [*arguments, f"training.per_device_train_batch_size={batch}", f"training.output_dir={output}"]


@pytest.mark.parametrize(
    ("strategy", "adapter"), [("ddp", LORA), ("zero3", FULL), ("fsdp2", FULL), ("zero3", LORA), ("fsdp2", LORA)]
)
def test_one_trajectory(strategy, adapter, config_file, family_folder, tmp_path) -> None:  # noqa: F811
    folder = family_folder("qwen3_moe")
    assert main([*run_of(config_file, folder, tmp_path / "one", 8), *adapter]) == 0
    launch(strategy, *run_of(config_file, folder, tmp_path / "two", 4), *adapter)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5)
    assert abs(one[0] - one[-1]) > 1e-4, "it learns something, or this could not see a wrong gradient"
    name = "model.safetensors" if adapter is FULL else "adapter_model.safetensors"
    expected, found = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert expected.keys() == found.keys()
    assert any("experts" in key for key in expected) and any(".gate." in key for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-4, msg=key)
