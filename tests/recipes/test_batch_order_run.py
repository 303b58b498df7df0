"""`data.batch_order` in runs: batches of similar pairs, kept across a stop, and the same in every process."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from test_resume import assert_same_outcome, command

from mmembed.config import load_config
from mmembed.errors import CheckpointError
from mmembed.training import trainer as module
from mmembed.training.checkpoints import last_checkpoint
from recipes.train_embedder import main
from tests.runs import build_trainer, launch, losses

ORDERED = "data.batch_order={type: similar, size: 4, neighbours: 12}"
TEXTS = ["data.train=[{path: text.jsonl}]", "data.dev=[]"]


def hardness(trainer, groups) -> float:
    """Mean cosine of the model between a query and the other positives of its batch."""
    trainer.plan.cluster(groups)
    source, model, found = trainer.train_sources[0], trainer.model.model.eval(), []
    for draws in trainer.plan:
        batch = trainer.collator([trainer.train_dataset[draw] for draw in draws])
        outputs = [trainer._encode(model, chunk) for chunk in batch.chunks]
        vectors = module.Embeddings.concatenate(outputs).vectors.detach()
        vectors = vectors[np.argsort(np.concatenate([chunk.index for chunk in batch.chunks]))][batch.place]
        queries, positives = vectors[: batch.n_queries], vectors[batch.n_queries :][batch.labels.relevance > 0]
        cosines = (queries @ positives.T).numpy()
        found.append(cosines[~np.eye(len(cosines), dtype=bool)].mean())
    assert source.name == "text.jsonl"
    return float(np.mean(found))


def test_pairs_of_a_batch_are_harder_for_each_other_than_random_ones(config_file, tmp_path):
    trainer = build_trainer(load_config(config_file, [ORDERED, *TEXTS, f"training.output_dir={tmp_path / 'out'}"]))
    (groups,) = trainer.groups
    assert len(groups) == 40 and np.bincount(groups).max() == 4
    assert "batch order of text.jsonl: similar by the model as it is now, 10 groups" in str(trainer.report())
    rows = [{row for _, row, _ in batch} for batch in trainer.plan]
    assert sum(map(len, rows)) == 40 and all(
        any({*np.flatnonzero(groups == number)} <= batch for batch in rows) for number in range(10)
    )
    random = [hardness(trainer, [np.random.default_rng(seed).permutation(40) // 4]) for seed in range(3)]
    assert hardness(trainer, [groups]) > max(random)


def test_a_source_whose_pairs_do_not_meet_is_left_as_it_is(config_file):
    sources = "data.train=[{path: text.jsonl, in_batch_negatives: false}, {path: pictures.jsonl}]"
    trainer = build_trainer(load_config(config_file, [ORDERED, sources, "data.dev=[]"]))
    assert trainer.groups[0] is None and len(trainer.groups[1]) == 10


@pytest.mark.parametrize("model", ["", "mmembed-nano"])
def test_a_stopped_run_keeps_its_groups_whatever_became_of_the_cache(
    config_file, tmp_path, stop_in_step, monkeypatch, model
):
    """Gone on with where vectors come out otherwise, say on another processor: the checkpoint knows the groups."""
    order = ORDERED.replace("}", f", model: {model}}}") if model else ORDERED
    overrides = [order, *TEXTS, "training.save_strategy=steps", "training.max_steps=6"]
    assert main(command(config_file, tmp_path / "whole", *overrides)) == 0
    stop_in_step(3)
    assert main(command(config_file, tmp_path / "stopped", *overrides)) == 75
    computed = module.group_sources
    monkeypatch.setattr(module, "group_sources", lambda *of: [one[::-1].copy() for one in computed(*of)])
    assert main(command(config_file, tmp_path / "stopped", *overrides)) == 0
    assert_same_outcome(tmp_path / "whole", tmp_path / "stopped")
    assert losses(tmp_path / "whole") != losses_of(config_file, tmp_path / "random", overrides[1:])


def losses_of(config_file, folder, overrides):
    assert main(command(config_file, folder, *overrides)) == 0
    return losses(folder)


def test_a_checkpoint_without_groups_is_refused(config_file, tmp_path, capsys):
    out = tmp_path / "out"
    overrides = [ORDERED, *TEXTS, "training.save_strategy=steps", "training.save_steps=2"]
    assert main(command(config_file, out, *overrides)) == 0
    last = last_checkpoint(out)
    assert sorted(last.glob("batch_order*")) == [last / "batch_order.safetensors"]
    (last / "batch_order.safetensors").unlink()
    trainer = build_trainer(load_config(config_file, [*overrides, f"training.output_dir={out}"]))
    with pytest.raises(CheckpointError, match="holds no batch_order.safetensors"):
        trainer.train(resume_from_checkpoint=str(last))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_batches_of_one(config_file, tmp_path, monkeypatch):
    """Each starts without a cache: what two encode together gives the groups of what one encodes."""
    common = [ORDERED, *TEXTS, "adapter.dropout=0"]
    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    assert main(command(config_file, tmp_path / "one", *common)) == 0
    shutil.rmtree(tmp_path / "cache" / "batch-order")
    four = "training.per_device_train_batch_size=4"
    launch("ddp", "--config", str(config_file), *common, four, f"training.output_dir={tmp_path / 'two'}")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)
