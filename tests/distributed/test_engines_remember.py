"""What an objective remembers where weights are divided: that of one process, saved, and the same after a resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_embedder import main
from tests.distributed.test_strategies import LORA, MANY, run_of
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ISOGCLR, QUEUE = "{type: isogclr, temperature: 0.2}", "{type: negative_queue, size: 16}"
OBJECTIVE = f"objective=[{ISOGCLR}, {QUEUE}, {{type: prototypes, prototypes: 4, labels: 2}}]"
REMEMBERING = [*LORA, *MANY, OBJECTIVE, "training.max_grad_norm=0"]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_one_memory(config_file, tmp_path, strategy):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*run_of(config_file, tmp_path, "one", 8), *REMEMBERING]) == 0
    arguments = [*run_of(config_file, tmp_path, "two", 4), *REMEMBERING]
    launch(strategy, *arguments)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, found = (load_file(folder / "objective.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    assert len(expected["objectives.0.memory.keys"]) > 8 and expected["objectives.1.queue.seen"] > 16
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    logged = losses(two)
    shutil.rmtree(two / "checkpoint-4")
    (two / "objective.safetensors").unlink()
    launch(strategy, *arguments, "training.resume_from_checkpoint=true")
    assert losses(two) == logged
    again = load_file(two / "objective.safetensors")
    for name, tensor in found.items():
        assert torch.equal(again[name], tensor), name
