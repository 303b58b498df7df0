"""What an objective remembers where weights are divided: that of one process, saved, and the same after a resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_embedder import main
from tests.distributed.test_strategies import FULL, LORA, MANY, run_of
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ISOGCLR, QUEUE = "{type: isogclr, temperature: 0.2}", "{type: negative_queue, size: 16}"
OBJECTIVE = f"objective=[{ISOGCLR}, {QUEUE}, {{type: prototypes, prototypes: 4}}]"
POSITIVES = "data.ignore_fields=[negatives]"  # these objectives compare no others
REMEMBERING = [*LORA, *MANY, OBJECTIVE, POSITIVES, "training.max_grad_norm=0"]


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


@pytest.mark.parametrize(("strategy", "weights"), [("ddp", LORA), ("zero2", FULL)], ids=["ddp", "zero2"])
def test_one_teacher(config_file, tmp_path, strategy, weights):  # noqa: F811
    """Losses, memory and teacher of one process; bit for bit the same after a resume."""
    taught = "objective=[{type: negative_queue, size: 16, momentum: 0.5}, {type: hycd, momentum: 0.5}]"
    options = [*weights, *MANY, taught, POSITIVES, "training.max_grad_norm=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*run_of(config_file, tmp_path, "one", 8), *options]) == 0
    arguments = [*run_of(config_file, tmp_path, "two", 4), *options]
    launch(strategy, *arguments)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)

    def files(folder):
        return load_file(folder / "objective.safetensors") | load_file(folder / "checkpoint-4" / "teacher.safetensors")

    expected, found = files(one), files(two)
    assert expected.keys() == found.keys() and len(expected) > 3
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    earlier = load_file(two / "checkpoint-2" / "teacher.safetensors")
    assert any(not torch.equal(found[name], tensor) for name, tensor in earlier.items())
    logged = losses(two)
    shutil.rmtree(two / "checkpoint-4")
    launch(strategy, *arguments, "training.resume_from_checkpoint=true")
    assert losses(two) == logged
    for name, tensor in files(two).items():
        assert torch.equal(found[name], tensor), name
