"""The training command on a tiny real vision-language model: what it writes, changes, repeats and refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmembed.config import load_config
from recipes.train_embedder import main
from tests.runs import build_trainer, in_two_processes, losses

LEARNED = "objective.temperature={value: 0.1, learn: true}"


def run(config_file, *overrides):
    assert main(["--config", str(config_file), *overrides]) == 0


def tensors_of(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def trained(folder):
    tensors = tensors_of(folder)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_main_job(config_file, tmp_path, capsys):
    from mmembed.content import to_content
    from mmembed.models.checkpoint import load_checkpoint
    from mmembed.preprocess import Item

    run(config_file, "training.eval_strategy=steps", "training.eval_steps=2")
    out = tmp_path / "out"
    report = capsys.readouterr().out
    assert "text.jsonl: 40 records" in report
    assert (
        "1.0 hard negatives a query, 14.0 in-batch negatives" in report
        or "0.0 hard negatives a query, 7.0 in-batch" in report
    )
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    step = next(entry for entry in history if "loss" in entry)
    assert {"accuracy", "temperature", "negatives", "pairs_per_second", "tokens_per_second", "grad_norm"} <= step.keys()
    evaluated = [entry for entry in history if "eval_ndcg_at_10" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    final = json.loads((out / "metrics.json").read_text())
    assert final["final_dev_ndcg_at_10"] == final["final_ndcg_at_10"] == evaluated[-1]["eval_ndcg_at_10"]
    assert load_file(out / "objective.safetensors")["temperature.log_scale"].item() != pytest.approx(np.log(10))
    model, preprocessor = load_checkpoint(out)
    vectors = model(preprocessor([Item(to_content("a red bus"), "query")])).vectors
    assert vectors.norm().item() == pytest.approx(1, abs=1e-5)


def test_lower_layers_are_trained_and_used(config_file, tmp_path, capsys):
    """2-D Matryoshka through the command: logged, remembered, and used without the upper layer."""
    from mmembed import Embedder
    from mmembed.content import to_content
    from mmembed.models.checkpoint import load_checkpoint
    from mmembed.preprocess import Item

    block = "objective=[{type: infonce, temperature: 0.1, matryoshka: {layers: [1, -1], dims: [64, 16]}}, "
    out = tmp_path / "out"
    run(config_file, block + "{type: uniformity, layer: middle, weight: 0.1}]", "data.dev=[]")
    assert "layers: vectors of 1, and of the last of 2\n" in capsys.readouterr().out
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    step = next(entry for entry in history if "loss" in entry)
    assert {"loss_layer_1", "kl_layer_1", "loss_layer_last", "loss_16", "loss_uniformity"} <= step.keys()
    model, preprocessor = load_checkpoint(out)
    assert model.settings.layers == (1,)
    model.give_layers([1])
    expected = model(preprocessor([Item(to_content("a red bus"))])).layers[1].detach().numpy()
    short = Embedder.from_pretrained(out, dtype="float32", layers=1)
    np.testing.assert_allclose(short.encode(["a red bus"]), expected, atol=1e-5)


def test_threads_compute_chunks_beside_each_other(config_file, tmp_path, monkeypatch):
    """With several threads and no dropout: same losses, same weights; with dropout chunks stay in turn."""
    import mmembed.training.gradcache as step

    counted, beside = [], step.beside_each_other

    def watched(given, make, workers):
        counted.append(workers)
        return beside(given, make, workers)

    monkeypatch.setattr(step, "beside_each_other", watched)
    still = ["adapter={type: lora, r: 4, alpha: 8, dropout: 0.0}", "training.token_budget=1024"]
    found = {}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            run(config_file, *still, f"training.output_dir={tmp_path / str(threads)}")
        finally:
            torch.set_num_threads(before)
        assert bool(counted) == (threads == 2)
        found[threads] = (losses(tmp_path / str(threads)), trained(tmp_path / str(threads)))
    assert set(counted) == {2}
    assert found[2][0] == pytest.approx(found[1][0], abs=1e-4)
    torch.testing.assert_close(found[2][1], found[1][1], atol=1e-3, rtol=1e-3)
    counted.clear()
    torch.set_num_threads(2)
    try:
        run(config_file, f"training.output_dir={tmp_path / 'dropout'}")
    finally:
        torch.set_num_threads(before)
    assert not counted


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter={type: lora, r: 4, alpha: 8, dropout: 0.0}"],
        ["adapter={type: none}", "training.learning_rate=1e-3", "training.learning_rates={projector: 1e-2}"],
        ["adapter={type: dora, r: 4, alpha: 8}", "pooling={type: latent_attention, num_latents: 4}", "projection=16"],
        ["training.optimizer=lion", "training.learning_rate=1e-3", "training.adam_beta1=0.95"],
        ["training.optimizer=adafactor"],
        ["training.optimizer=adamw_8bit"],
        ["training.bf16=true", "model.gradient_checkpointing=true"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_trained_parameter_changes_and_no_frozen_one(config_file, overrides):
    config = load_config(config_file, [*overrides, "data.dev=[]"])
    trainer = build_trainer(config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    vision = [name for name, tower in trainer.model.towers().items() if tower == "vision"]
    assert vision
    changed = {name: not torch.equal(before[name], value) for name, value in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        assert changed[name] == parameter.requires_grad, name
    assert not any(changed[name] for name in vision)
    if config.training.learning_rates:
        assert {group["tower"]: group["initial_lr"] for group in trainer.optimizer.param_groups}["projector"] == 1e-2


@pytest.mark.parametrize(
    "overrides",
    [["training.grad_cache=false"], ["training.token_budget=60"], ["training.grad_cache=true", "gc_chunk_size=3"]],
    ids=" ".join,
)
def test_one_trajectory_for_any_chunking(config_file, tmp_path, overrides):
    exact = ["adapter.dropout=0.0", "data.dev=[]"]
    run(config_file, *exact, f"training.output_dir={tmp_path / 'a'}")
    run(config_file, *exact, *overrides, f"training.output_dir={tmp_path / 'b'}")
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)


def test_accumulation_averages_gradients(config_file, tmp_path):
    """Two accumulated batches a step: half the steps an epoch, the mean of both losses, the mean of both gradients.

    By plain gradient descent, which shows how large a gradient was (Adam does not), in steps so small that the second
    of two single ones starts where the first did: together they go twice as far as one step by the mean.
    """
    exact = ["adapter.dropout=0.0", "data.dev=[]", "training.learning_rate=1e-6", "training.optim=sgd"]
    exact += ["training.max_grad_norm=0", "training.warmup_steps=0", "training.lr_scheduler_type=constant"]
    run(config_file, *exact, f"training.output_dir={tmp_path / 'a'}")
    run(
        config_file,
        *exact,
        "training.max_steps=2",
        "training.gradient_accumulation_steps=2",
        f"training.output_dir={tmp_path / 'b'}",
    )
    single, double = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert double == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-4)
    moved, half = (
        torch.cat([tensor.flatten() for name, tensor in sorted(tensors_of(tmp_path / of).items()) if "lora_B" in name])
        for of in "ab"
    )  # from zero, where LoRA starts
    assert moved.norm() > 0
    assert (2 * half - moved).norm() < 1e-3 * moved.norm()


def test_a_loss_scale_leaves_the_gradient_as_it_is(config_file):
    """What fp16 does on a GPU: gradients are scaled before the backward, and unscaled before they are clipped."""
    gradients = []
    for scaled in (False, True):
        trainer = build_trainer(load_config(config_file, ["data.dev=[]", "adapter.dropout=0.0"]))
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.current_gradient_accumulation_steps = 2
        optimizer = trainer.create_optimizer()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.training_step(trainer.model, batch)
        found = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        if scaled:
            assert max(gradient.abs().max() for gradient in found) > 100 * gradients[0].abs().max()
            assert trainer.tally.health["loss_scale"] == 1024
            trainer.accelerator.scaler.unscale_(optimizer)
        else:
            assert "loss_scale" not in trainer.tally.health
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_evaluating_other_sets_than_the_runs_own(config_file):
    trainer = build_trainer(load_config(config_file))
    (dev,) = trainer.dev_sets
    metrics = trainer.evaluate([dataclasses.replace(dev, name="other")], metric_key_prefix="test")
    assert "test_other_ndcg_at_10" in metrics and "test_dev_ndcg_at_10" not in metrics
    assert trainer.evaluate()["eval_dev_ndcg_at_10"] == metrics["test_other_ndcg_at_10"]


@pytest.mark.distributed
def test_two_processes_follow_the_trajectory_of_one(config_file, tmp_path):
    exact = ["adapter.dropout=0.0"]
    run(config_file, *exact, f"training.output_dir={tmp_path / 'one'}")
    overrides = [*exact, "training.per_device_train_batch_size=4", f"training.output_dir={tmp_path / 'two'}"]
    done = in_two_processes("recipes.train_embedder", "--config", str(config_file), *overrides)
    assert "processes: 2" in done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["final_dev_ndcg_at_10"] == pytest.approx(metrics[1]["final_dev_ndcg_at_10"], abs=1e-6)


def test_best_checkpoint_and_early_stopping(config_file, tmp_path):
    """A learning rate that destroys the model: evaluation gets worse, training stops, the best is what is saved."""
    run(
        config_file,
        "training.max_steps=12",
        "training.learning_rate=5.0",
        "training.lr_scheduler_type=constant",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
        "training.save_strategy=steps",
        "training.save_steps=1",
        "training.load_best_model_at_end=true",
        "training.early_stopping_patience=2",
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    values = [entry["eval_ndcg_at_10"] for entry in state["log_history"] if "eval_ndcg_at_10" in entry]
    assert len(values) < 12
    assert state["best_metric"] == max(values)
    final = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert final["final_ndcg_at_10"] == pytest.approx(max(values), abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["training.lerning_rate=1"], ["training", "learning_rate"]),
        (["modle.dtype=float32"], ["modle", "model"]),
        (["objective.symetric=true"], ["symetric", "symmetric"]),
        (["pooling=maen"], ["maen", "mean"]),
        (["data.train=[{path: text.jsonl, formt: jsonl}]"], ["data.train.0.formt", "format"]),
        (["adapter={type: prefix}", "model.attention=bidirectional"], ["prefix", "bidirectional"]),
        (["objective.similarity=maxsim"], ["multi_vector"]),
        (["objective.matryoshka={dims: [4096]}"], ["4096", "64"]),
        (["training.per_device_train_batch_size=41"], ["text.jsonl", "40 rows", "41"]),
        (["data.train_group_size=1"], ["negatives", "ignore_fields"]),
        (["objective=supcon"], ["'negatives'", "'supcon'", "ignore_fields: [negatives]"]),
        (["data.train=[{path: missing.jsonl}]"], ["missing.jsonl"]),
        (["data.train=[]"], ["data.train"]),
        (["data.train=[{path: sts.jsonl}]"], ["relevance"]),
        (["training.warmup_steps=many"], ["training"]),
        (["training.use_cache=true"], ["use_cache"]),
        (["training.resume_from_checkpoint=true"], ["no complete checkpoint"]),
    ],
    ids=lambda value: value[0],
)
def test_bad_input_is_refused_with_key_and_remedy(config_file, capsys, overrides, messages):
    assert main(["--config", str(config_file), *overrides]) == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
