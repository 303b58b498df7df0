"""The worst batch goes first, and a run with it is the run without it."""

import pytest
import torch

from mmembed.config import load_config
from mmembed.errors import MmembedError
from recipes import train_embedder
from tests.runs import build_trainer


def trained(config_file, *overrides):
    """A finished trainer of a run with dropout, and the padded tokens of the batches that it computed, in order."""
    trainer = build_trainer(load_config(config_file, ["data.dev=[]", *overrides]))
    seen, add_gradient = [], trainer._add_gradient

    def noted(model, batch, **options):
        seen.append(batch.padded_tokens)
        return add_gradient(model, batch, **options)

    trainer._add_gradient = noted
    trainer.train()
    return trainer, seen


REMEMBERING = ["objective=[{type: isogclr}, {type: negative_queue, size: 8}]", "data.ignore_fields=[negatives]"]


@pytest.mark.parametrize("overrides", [[], REMEMBERING])
def test_the_trajectory_is_the_same_bit_for_bit(config_file, overrides):
    """Of weights, and of what an objective remembers."""
    without, plain = trained(config_file, *overrides)
    first, seen = trained(config_file, *overrides, "training.worst_batch_first=true")
    assert seen[1:] == plain
    assert seen[0] == max(
        first.collator([first.train_dataset[draw] for draw in draws]).padded_tokens for draws in first.plan
    )
    assert any(module.p > 0 for module in first.model.modules() if isinstance(module, torch.nn.Dropout))
    for one, other in zip(without.model.state_dict().values(), first.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    logs = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (without, first)]
    assert logs[0] == logs[1]


def test_a_number_bounds_the_batches_that_are_looked_at(config_file, caplog):
    with caplog.at_level("INFO"):
        trained(config_file, "training.worst_batch_first=2", "training.max_steps=1")
    assert "the worst of 2 batches looked at" in caplog.text


def test_an_optimizer_that_does_not_fit_is_an_error_with_the_numbers(config_file, monkeypatch):
    """The allocator refuses 2^60 bytes in earnest."""
    monkeypatch.setattr("mmembed.training.trainer.optimizer_bytes", lambda *_: (2**60, 0))
    with pytest.raises(MmembedError, match=r"optimizer's state takes 1,099,511,627,776 MB.*What needs less"):
        trained(config_file, "training.worst_batch_first=true")


def test_the_flag_sets_the_option(config_file, monkeypatch):
    configs = []
    monkeypatch.setattr(train_embedder, "train", configs.append)
    assert train_embedder.main(["--config", str(config_file), "--worst-batch-first"]) == 0
    assert configs[0].training.worst_batch_first is True
