"""Contrast and captions in one run, through the training command: what is logged, learned, saved and refused."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from mmembed.backbones import resolve_backbone
from mmembed.config import load_config
from mmembed.models.checkpoint import load_checkpoint
from mmembed.plan import plan_run
from recipes.train_embedder import main
from tests.runs import build_trainer

OBJECTIVE = "objective=[{type: infonce, temperature: 0.05}, {type: captioning, weight: 0.5}]"


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def run(config_file, *overrides):
    return main(["--config", str(config_file), OBJECTIVE, "adapter.dropout=0.0", *overrides])


def test_nano_learns_to_write_its_documents(config_file, tmp_path, capsys):
    """The packaged backbone with LoRA on texts and pictures with captions: the loss of the tokens falls."""
    more = ["model.name_or_path=mmembed-nano", "data.train=[{path: mixed.jsonl}]", "training.max_steps=20"]
    assert run(config_file, *more) == 0
    log, report = log_of(tmp_path / "out"), capsys.readouterr().out
    assert "tokens are predicted" in report and "warning: the first batch" not in report
    losses = [entry["loss_captioning"] for entry in log]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])  # an epoch each
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["loss_infonce"] + 0.5 * entry["loss_captioning"], abs=1e-3)
        assert entry["perplexity"] == pytest.approx(2.718281828 ** entry["loss_captioning"], rel=1e-3)
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not any("lm_head" in name or "output_embedding" in name for name in tensors.keys())  # noqa: SIM118  (no dict)
    load_checkpoint(tmp_path / "out")


def test_all_weights_are_saved_and_resumed_without_it(config_file, tmp_path, stop_in_step):
    """A stop changes nothing; what was saved is the embedder alone."""
    full = ["model.name_or_path=mmembed-nano", "adapter={type: none}", "training.learning_rate=1e-3"]
    full += ["training.save_strategy=steps", "training.save_steps=100"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(config_file, *full, f"training.output_dir={once}") == 0
    stop_in_step(3)
    assert run(config_file, *full, f"training.output_dir={twice}") == 75
    assert run(config_file, *full, f"training.output_dir={twice}") == 0
    for key in ("loss", "loss_captioning", "perplexity"):
        assert [entry[key] for entry in log_of(once)] == [entry[key] for entry in log_of(twice)], key
    weights = load_file(once / "model.safetensors")
    assert not any("lm_head" in name for name in weights)
    assert all((weights[name] == other).all() for name, other in load_file(twice / "model.safetensors").items())


def test_a_plan_counts_it(config_file, tmp_path):
    """From a folder without weights: the output embedding, which no strategy divides, and what predicting keeps."""
    shutil.copytree(resolve_backbone("mmembed-nano"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    more = [f"model.name_or_path={tmp_path / 'bare'}", "data.train=[{path: text.jsonl}]"]
    plain, told = (
        plan_run(load_config(config_file, [*more, one]), devices=2) for one in ("objective=infonce", OBJECTIVE)
    )
    for without, with_it in zip(plain.stages, told.stages, strict=True):
        assert with_it.weights - without.weights == 7680 * 256 * 4, with_it.name
        assert with_it.activations > without.activations
    assert plain.largest_chunk == told.largest_chunk


def test_sources_without_it_predict_nothing(config_file, monkeypatch):
    """By source: the other one's batches carry no such mask, and cost nothing."""
    by_source = "objective={by_source: {text: [infonce, captioning], pictures: infonce}}"
    sources = "data.train=[{path: text.jsonl, name: text}, {path: pictures.jsonl, name: pictures}]"
    trainer = build_trainer(load_config(str(config_file), [sources, by_source]))
    seen = set()
    for draws in trainer.plan:
        batch = trainer.collator([trainer.train_dataset[draw] for draw in draws])
        seen.add((batch.labels.source, *{row.predicted is None for chunk in batch.chunks for row in chunk.rows}))
    assert seen == {("text", False), ("pictures", True)}


def test_nothing_to_predict_is_said(config_file, capsys):
    """Documents that are pictures alone."""
    assert run(config_file, "data.train=[{path: pictures.jsonl}]", "training.max_steps=2") == 0
    assert "has no text of the role document to predict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("qwen3", "model.attention=bidirectional", "has seen those it is to predict; set model.attention: causal"),
        ("paligemma", "training.max_steps=1", "has seen those it is to predict; set model.attention: causal"),
    ],
)
def test_refused_before_data_is_read(config_file, capsys, monkeypatch, family_folder, family, override, message):
    def read(*arguments, **options):
        raise AssertionError("data was read")

    monkeypatch.setattr("mmembed.data.dataset.RecordDataset", read)
    assert run(config_file, f"model.name_or_path={family_folder(family)}", override) == 2
    assert message in capsys.readouterr().err
