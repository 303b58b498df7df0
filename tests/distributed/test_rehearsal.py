"""The worst batch first under every engine: it goes through, and the run is the run without it, bit for bit.

The engine gets its gradients times 0. Whatever it keeps of them (ZeRO-3 adds from its second backward on, FSDP2 holds
whole gradients until the last chunk) would show in the first step. Half a minute a strategy.
"""

import pytest
import torch

from tests.distributed.test_strategies import MANY, weights
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_the_trajectory_is_the_same_bit_for_bit(config_file, tmp_path, strategy):  # noqa: F811
    """With dropout, pictures in some batches, several chunks a batch, two accumulated."""
    common = ["--config", str(config_file), *MANY, "data.train=[{path: mixed.jsonl}]", "data.dev=[]"]
    common += ["adapter.dropout=0.1", "training.gradient_accumulation_steps=2", "training.max_steps=2"]
    common += ["training.per_device_train_batch_size=4"]
    launch(strategy, *common, f"training.output_dir={tmp_path / 'without'}")
    done = launch(strategy, *common, f"training.output_dir={tmp_path / 'first'}", "--worst-batch-first")
    assert "the worst of 5 batches looked at" in done.stderr
    assert losses(tmp_path / "first") == losses(tmp_path / "without")
    expected, found = weights(tmp_path / "without"), weights(tmp_path / "first")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
