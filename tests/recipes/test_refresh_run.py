"""`data.mining` in runs: new negatives at their steps, the same after a stop, in every process, and from one apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_resume import assert_same_outcome, command

from mmembed.config import load_config
from mmembed.models.checkpoint import load_checkpoint
from mmembed.training.data_vectors import encoder_of
from mmembed.training.refresh import Refresh, mine_sources, mined_sources
from recipes.train_embedder import main
from tests.runs import build_trainer, launch, losses

MINING = "data.mining={rules: [{type: rank_window, first: 1}, random], depth: 8, negatives: 3, every: 2}"
BESIDE = MINING.removesuffix("}") + ", asynchronous: true}"
RUN = ["data.train=[{path: text.jsonl}]", "data.dev=[]", "data.train_group_size=3", "training.max_steps=7"]
SAVED = [
    *RUN,
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=9",
    "training.per_device_train_batch_size=4",
]


def mined_at(folder: Path, step: int) -> np.ndarray:
    return load_file(folder / f"checkpoint-{step}" / "mined.safetensors")["0"].numpy()


def of_weights(config_file, folder: Path, step: int) -> np.ndarray:
    """What the model of a checkpoint mines, in a process that does not train."""
    config = load_config(config_file, [MINING, *SAVED, f"training.output_dir={folder}"])
    trainer = build_trainer(config)
    model, preprocessor = load_checkpoint(folder / f"checkpoint-{step}", media=trainer.preprocessor.media)
    sources = mined_sources(dict(enumerate(trainer.train_sources)))
    encoder = encoder_of(model, preprocessor, trainer.args.device, 256, None)
    refresh = Refresh(config, sources, trainer.args.seed, folder)
    return mine_sources(config.data.mining, sources, refresh.corpora, encoder, step, trainer.args.seed).rows[0]


@pytest.mark.parametrize("mining", [MINING, BESIDE], ids=["in the process", "in another"])
def test_negatives_come_at_their_steps_and_again_after_a_stop(config_file, tmp_path, stop_in_step, mining):
    """Stopped where a refresh is due, and between two: bit for bit the uninterrupted run."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    workers = "training.dataloader_num_workers=1"  # read ahead, before the negatives are mined
    assert main(command(config_file, whole, mining, *SAVED)) == 0
    stop_in_step(2, 5)
    assert [main(command(config_file, stopped, mining, *SAVED, workers)) for _ in range(3)] == [75, 75, 0]
    assert_same_outcome(whole, stopped)
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    refreshed = [(entry["step"], entry["mined_with"]) for entry in history if "mined_with" in entry]
    if mining == MINING:
        assert refreshed == [(0, 0), (2, 2), (4, 4), (6, 6)]
        acting = {3: 2, 4: 2, 7: 6}  # of the checkpoint behind a step: which weights had mined for it
    else:
        assert refreshed == [(0, 0), (4, 2), (6, 4)]
        acting = {3: 0, 5: 2, 7: 4}
    for step, weights in acting.items():
        if weights:
            np.testing.assert_array_equal(mined_at(whole, step), of_weights(config_file, whole, weights))
    assert not np.array_equal(mined_at(whole, 3), mined_at(whole, 7)), "the model has moved"
    assert not list((whole / "mining").glob("step-2/model")), "weights go when they were used"


def test_what_is_mined_trains(config_file, tmp_path):
    """Other negatives than the records' own: another trajectory, whose batches hold the mined documents."""
    out = tmp_path / "out"
    assert main(command(config_file, out, MINING, *RUN)) == 0
    assert main(command(config_file, tmp_path / "own", *RUN)) == 0
    assert losses(out) != losses(tmp_path / "own")
    trainer = build_trainer(load_config(config_file, [MINING, *RUN, f"training.output_dir={out}"]))
    assert "mined negatives: 3 a query of 80 documents, before the first step and every 2" in str(trainer.report())
    (drawn,) = next(iter(zip(trainer.get_train_dataloader(), strict=False)))
    trainer._mine(trainer.refresh)
    batch = trainer._collated(drawn)
    assert batch.n_documents == 3 * batch.n_queries
    rows, corpus = trainer.refresh.mined.rows[0], trainer.refresh.corpora[0]
    for query, ((_, row, _), _) in enumerate(drawn):
        held = batch.labels.document_keys[batch.labels.owner == query][1:, 1].tolist()
        assert {*held} <= {int(corpus.contents[number]) for number in rows[row]}


def test_a_list_with_a_queue_trains_on_mined_negatives_too(config_file, tmp_path, stop_in_step):
    """InfoNCE with mined negatives beside a momentum queue and cross-batch memory: stopped, the same."""
    mochi, queue = "{type: mochi, size: 8, hardest: 4}", "{type: negative_queue, size: 8, momentum: 0.9}"
    memory = [MINING, *SAVED, f"objective=[infonce, {queue.replace(', momentum: 0.9', '')}, {mochi}]"]
    momentum = [MINING, *SAVED, f"objective=[infonce, {queue}, {mochi}]"]
    for name, settings in (("memory", memory), ("momentum", momentum)):
        whole, stopped = tmp_path / f"{name}-whole", tmp_path / f"{name}-stopped"
        assert main(command(config_file, whole, *settings)) == 0
        stop_in_step(3)
        assert [main(command(config_file, stopped, *settings)) for _ in range(2)] == [75, 0]
        assert_same_outcome(whole, stopped)
        kept = load_file(stopped / "objective.safetensors")
        assert kept["objectives.1.queue.seen"].item() == 7 * 4
        np.testing.assert_array_equal(mined_at(whole, 7), mined_at(stopped, 7))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "mining"), [("ddp", MINING), ("ddp", BESIDE), ("fsdp2", BESIDE), ("zero3", BESIDE)]
)
def test_two_processes_mine_what_one_does(config_file, tmp_path, strategy, mining):
    """Also where the weights are divided, and by groups that the model has ordered."""
    common = [mining, *SAVED, "adapter.dropout=0", "data.batch_order={type: similar, size: 4}"]
    assert main(command(config_file, tmp_path / "one", *common)) == 0
    half = "training.per_device_train_batch_size=2"
    launch(strategy, "--config", str(config_file), *common, half, f"training.output_dir={tmp_path / 'two'}")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)
    for step in (1, 4, 7):
        np.testing.assert_array_equal(mined_at(tmp_path / "one", step), mined_at(tmp_path / "two", step))
