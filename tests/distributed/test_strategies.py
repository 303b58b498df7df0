"""Two processes under each shipped strategy follow the trajectory of one, through the real command.

Chunks (one, many), adapter (LoRA, full, QLoRA), accumulation and clipping are crossed with the strategies; `python -m
benchmarks.equivalence` runs all combinations. AdamW with an epsilon of 1, which is gradient descent with a state to
resume: the usual one hides a factor in a gradient, and turns rounding into steps where a gradient is nearly zero.
"""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from mmembed.models.checkpoint import load_checkpoint
from recipes.train_embedder import main
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PLAIN = ["training.adam_epsilon=1", "training.learning_rate=1e-2", "training.lr_scheduler_type=constant"]
LORA = ["adapter.dropout=0.0"]
HEADS = ["pooling={type: latent_attention, num_latents: 4}", "projection=16"]
FULL = ["adapter={type: none}"]
QLORA = ["adapter.type=qlora", "adapter.dropout=0.0", "model.dtype=auto"]
CAPTIONS = ["objective=[{type: infonce, temperature: 0.1}, {type: captioning, weight: 0.5, sides: both}]"]
MANY, WHOLE = ["training.token_budget=64"], ["training.token_budget=100000"]
TWICE = ["training.gradient_accumulation_steps=2"]
LAYERS = ["objective={type: infonce, temperature: 0.1, matryoshka: {layers: [1, -1], kl_weight: 0}}"]
CASES = {
    "ddp": ("every process holds the whole model", [*LORA, *MANY, "training.max_grad_norm=0"]),
    "zero1": ("DeepSpeed ZeRO-1 divides optimizer state", [*LORA, *TWICE, "training.max_grad_norm=0"]),
    "zero2": (
        "DeepSpeed ZeRO-2 divides optimizer state and gradients",
        [*FULL, *MANY, *TWICE, "training.max_grad_norm=0"],
    ),
    "zero3": (
        "DeepSpeed ZeRO-3 divides optimizer state, gradients, weights",
        [*LORA, *HEADS, *MANY, *TWICE, "training.max_grad_norm=0"],
    ),
    "fsdp2": ("FSDP2 divides optimizer state, gradients, weights", [*FULL, *MANY, *TWICE, "training.max_grad_norm=0"]),
    "fsdp2 lora": ("FSDP2 divides optimizer state, gradients, weights", [*LORA, *MANY, "training.max_grad_norm=0"]),
    "zero3 layers": (
        "DeepSpeed ZeRO-3 divides optimizer state, gradients, weights",
        [*LORA, *HEADS, *MANY, *LAYERS, "training.max_grad_norm=0"],
    ),
    "fsdp2 layers": (
        "FSDP2 divides optimizer state, gradients, weights",
        [*FULL, *MANY, *LAYERS, "training.max_grad_norm=0"],
    ),
    # 4-bit weights that evaluating repacks would lose gradients in the third step.
    "ddp qlora": ("every process holds the whole model", [*QLORA, *MANY, *TWICE, "training.max_grad_norm=0"]),
    "zero1 qlora": ("DeepSpeed ZeRO-1 divides optimizer state", [*QLORA, *TWICE, "training.max_grad_norm=0"]),
    "fsdp2 qlora": (
        "FSDP2 divides optimizer state, gradients, weights",
        [*QLORA, *HEADS, *MANY, *TWICE, "training.max_grad_norm=0"],
    ),
    # Its output embedding is the input's, which ZeRO-3 divides and gathers for a use outside of its own module.
    "zero3 captioning": (
        "DeepSpeed ZeRO-3 divides optimizer state, gradients, weights",
        [*FULL, *CAPTIONS, *MANY, "training.max_grad_norm=0"],
    ),
    # Clipping to a norm hides a factor in the gradient, so it has cases of its own.
    "zero1 clipped": ("DeepSpeed ZeRO-1 divides optimizer state", [*LORA, *TWICE, "training.max_grad_norm=1"]),
    "fsdp2 clipped": (
        "FSDP2 divides optimizer state, gradients, weights",
        [*FULL, *MANY, *TWICE, "training.max_grad_norm=1"],
    ),
}


def run_of(config_file, tmp_path, name, batch):  # noqa: F811
    """Arguments of a run into `tmp_path / name`: pictures in some records, a checkpoint and a score every 2 steps."""
    arguments = ["--config", str(config_file), *PLAIN, "data.train=[{path: mixed.jsonl}]"]
    arguments += ["training.save_strategy=steps", "training.save_steps=2", "training.eval_strategy=steps"]
    arguments += ["training.eval_steps=2", "training.load_best_model_at_end=true", "training.greater_is_better=false"]
    arguments += ["training.metric_for_best_model=ndcg_at_10"]
    return [*arguments, f"training.per_device_train_batch_size={batch}", f"training.output_dir={tmp_path / name}"]


def weights(folder):
    """Every saved tensor."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "probes.safetensors"]
    return {f"{file.name}: {name}": value for file in files for name, value in load_file(file).items()}


def evaluations(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_ndcg_at_10"] for entry in history if "eval_ndcg_at_10" in entry]


def gradient_norms(folder):
    """Norms by part of each logged step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith("grad_norm_")} for entry in logs]


@pytest.mark.parametrize("strategy", CASES)
def test_one_trajectory(config_file, backbone, tmp_path, strategy):  # noqa: F811
    """The same losses, dev scores, best checkpoint and weights; resumed from the middle, the same once more."""
    says, case = CASES[strategy]
    launched, _, variant = strategy.partition(" ")
    chunks = WHOLE if variant == "qlora" else []  # one process in the fewest chunks, two in many
    assert main([*run_of(config_file, tmp_path, "one", 8), *case, *chunks]) == 0
    arguments = [*run_of(config_file, tmp_path, "two", 4), *case]
    if launched == "zero1":  # its weights are whole: no process has to run the vision tower because another does
        arguments += [f"training.vision_cache={tmp_path / 'features'}"]
    # Each strategy once as a user starts it, and always in 4 bits: their last digit hangs on how memory is laid out.
    done = launch(launched, *arguments, cold=variant in ("", "qlora"))
    assert f"processes: 2, {says}\n" in done.stdout
    assert ("image features: not kept" in done.stdout) == (launched != "zero1")
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert evaluations(two) == pytest.approx(evaluations(one), abs=1e-6)
    norms = gradient_norms(one), gradient_norms(two)
    assert all(norms[0]) and norms[1] == [pytest.approx(step, rel=1e-4, abs=3e-6) for step in norms[0]]
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].numel() > 0
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    model, _ = load_checkpoint(two)
    assert all(parameter.numel() for parameter in model.parameters())
    assert any(isinstance(module, Linear4bit) for module in model.modules()) == (variant == "qlora")
    if launched in ("ddp", "zero2") or variant == "clipped":  # resuming is that of one process, and that of ZeRO-1
        return
    for file in (two / "checkpoint-2").rglob("*model_states.pt"):
        assert file.stat().st_size < (backbone / "model.safetensors").stat().st_size / 4, "the frozen backbone is in it"
    logged = losses(two)
    shutil.rmtree(two / "checkpoint-4")
    for file in two.glob("*.safetensors"):
        file.unlink()
    launch(launched, *arguments, "training.resume_from_checkpoint=true", cold=variant == "qlora")
    assert losses(two) == logged
    for name, tensor in weights(two).items():
        assert torch.equal(found[name], tensor), name


def test_the_yaml_of_several_processes_trains_one(config_file, tmp_path):  # noqa: F811
    """DDP wraps it all the same, and would reduce each chunk's gradient while the next one needs the same weights."""
    assert main([*run_of(config_file, tmp_path, "one", 8), *LORA, *MANY]) == 0
    launch("ddp", *run_of(config_file, tmp_path, "two", 8), *LORA, *MANY, processes=1)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


RERANKER = """
model: {{name_or_path: {backbone}, dtype: float32}}
head: {{type: yes_no, words: [a, b]}}
prompt: {{type: judge, words: [a, b]}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.0}}
lengths: {{query_max_length: 200, document_max_length: 100}}
objective: {{type: ranking, loss: infonce}}
data: {{root: {data}, train_group_size: 2, train: [{{path: mixed.jsonl}}], dev: [{{path: dev.jsonl, name: dev}}]}}
training: {{per_device_train_batch_size: 4, max_steps: 3, warmup_steps: 0, logging_steps: 1, save_strategy: "no",
  token_budget: 512, disable_tqdm: true, adam_epsilon: 1, learning_rate: 1e-2, lr_scheduler_type: constant}}
"""


LISTS = [
    "head={type: attention, layer: 1, offset: 512}",
    "prompt=in_context",
    "objective=[{type: answer}, {type: ranking, loss: infonce, temperature: 0.05, weight: 0.1}]",
]


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("ddp", []), ("zero3", []), ("fsdp2", []), ("zero3", LISTS), ("fsdp2", LISTS)],
    ids=["ddp", "zero3", "fsdp2", "zero3 in context", "fsdp2 in context"],
)
def test_a_reranker_has_one_trajectory(backbone, data, tmp_path, strategy, changes):  # noqa: F811
    """Of pairs with and without pictures; the saved head is whole. Of lists, whose attention is read below the top."""
    from recipes import train_reranker

    path = tmp_path / "run.yaml"
    path.write_text(RERANKER.format(backbone=backbone, data=data))
    common, divided = ["--config", str(path), *changes], tmp_path / "two"
    assert train_reranker.main([*common, f"training.output_dir={tmp_path / 'one'}"]) == 0
    arguments = [*common, f"training.output_dir={divided}", "training.per_device_train_batch_size=2"]
    launch(strategy, *arguments, command="recipes/train_reranker.py")
    assert losses(divided) == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    ours, theirs = weights(divided), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert changes or any(name.startswith("pooling") for name in ours)
    for name, one in theirs.items():
        torch.testing.assert_close(ours[name], one, atol=2e-4, rtol=0, msg=name)
