"""On a real CUDA device: the same vectors, gradients and trajectories as on the CPU, and a real lack of memory."""

import itertools
import json

import numpy as np
import pytest
import torch
from families import TEXTS, picture
from transformers import TrainerCallback

from mmembed import Embedder
from mmembed.config import build_config
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Text
from mmembed.data.collate import Collator
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step
from tests.equivalence.toy import gradients, relative
from tests.runs import build_trainer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
EXAMPLES = [
    Example(
        (Text(f"a question about {index} " + "and more words " * (index % 3)),),
        (Document((Text(f"an answer {index} " * (1 + index)),)), Document((Text(f"no answer {index}"),), 0.0)),
        source="s",
        where=str(index),
    )
    for index in range(5)
]
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.3, "target_modules": "auto"}


@pytest.fixture(autouse=True)
def whole_float32():
    """Another test of this process may have turned TF32 on."""
    from transformers.utils.import_utils import enable_tf32

    enable_tf32(False)


# Vectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("prefix", ["", "Instruct: find what answers this\nQuery: "])
def test_vectors_are_those_of_the_cpu(family_folder, family, prefix):
    """With and without a prefix that is shared; pictures where the backbone sees."""
    contents = [*TEXTS, " ".join(TEXTS) * 3]
    if family.endswith("vl"):
        contents += [picture(), {"text": "a bus", "image": picture(1, 60, 120)}]
    found = {}
    for device in ("cpu", DEVICE):
        prompt = {"type": "plain", "query_prefix": prefix}
        model, preprocessor = build_from_settings(
            EmbedderSettings(str(family_folder(family)), dtype="float32", prompt=prompt)
        )
        embedder = Embedder(model.to(device), preprocessor)
        assert embedder.device.type == device
        found[device] = embedder.encode(contents, role="query", token_budget=150)
    assert np.abs(found["cpu"] - found[DEVICE]).max() < 1e-4


def test_the_default_device_and_precision(family_folder):
    embedder = Embedder.from_pretrained(family_folder("qwen3"))
    assert embedder.device.type == DEVICE
    exact = Embedder.from_pretrained(family_folder("qwen3"), dtype="float32", device="cpu").encode(TEXTS)
    assert (embedder.encode(TEXTS) * exact).sum(1).min() > 0.999


# One step -------------------------------------------------------------------------------------------------------------


def gradient(folder, device, chunk_tokens, keep_tokens, checkpointing=False, adapter=None, seed=7):
    """Flat gradient of one step, and the number that the device would draw next."""
    torch.manual_seed(0)
    settings = EmbedderSettings(str(folder), dtype="float32", adapter=adapter)
    model, preprocessor = build_from_settings(settings)
    model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    objective = build_objective({"type": "contrastive", "temperature": {"value": 0.1, "learn": True}}).to(device)
    batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens, train_group_size=2)(EXAMPLES)
    torch.manual_seed(seed)
    contrastive_step(lambda chunk: model(chunk.inputs(preprocessor).to(device)), objective, batch, keep_tokens)
    drawn = torch.rand(1, device=device).item()
    return gradients(model.cpu(), objective.cpu()), drawn


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_gradients_are_those_of_the_cpu_in_any_chunking(family_folder, family):
    folder = family_folder(family)
    expected, _ = gradient(folder, "cpu", 10**6, None)
    assert expected.norm() > 0
    for chunk_tokens, keep_tokens, checkpointing in [
        (10**6, None, False),
        (60, None, False),
        (60, 0, False),
        (100, 120, False),
        (60, 0, True),
    ]:
        found, _ = gradient(folder, DEVICE, chunk_tokens, keep_tokens, checkpointing)
        assert relative(found, expected) < 1e-4


def test_dropout_repeats_in_the_second_pass(family_folder):
    """All graphs kept is plain autograd. Other numbers drawn give another gradient, or this could not fail."""
    folder = family_folder("qwen3")
    kept, after = gradient(folder, DEVICE, 60, None, adapter=LORA)
    for keep_tokens, checkpointing in [(0, False), (100, False), (0, True)]:
        found, then = gradient(folder, DEVICE, 60, keep_tokens, checkpointing, adapter=LORA)
        assert relative(found, kept) < 1e-4
        assert then == after
    other, _ = gradient(folder, DEVICE, 60, None, adapter=LORA, seed=8)
    assert relative(other, kept) > 1e-2


# Runs -----------------------------------------------------------------------------------------------------------------


def run(
    folder, path, resume=None, callbacks=(), records=64, words=12, model=None, adapter=None, pictures=False, **more
):
    """(losses, log) of a run of a few steps."""
    folder.mkdir(exist_ok=True)
    names = itertools.cycle(("river", "bread", "engine", "letter", "forest", "tower"))
    lines = []
    for index in range(records):
        content = " ".join([str(index), *(next(names) for _ in range(words))])
        if pictures:
            picture(index, 60 + index, 60).save(folder / f"{index}.png")
            content = {"image": f"{index}.png"}
        lines.append({"query": f"what is {index} {next(names)}", "documents": [{"content": content}]})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        **more,
    }
    trainer = build_trainer(
        build_config(
            {
                "model": {"name_or_path": str(path), "dtype": "float32", **(model or {})},
                "adapter": adapter or {"type": "none"},
                "lengths": {"query_max_length": 64, "document_max_length": 512},
                "data": {"train": [{"path": str(folder / "data.jsonl")}], "train_group_size": 1},
                "objective": {"type": "contrastive", "temperature": 0.1},
                "training": training,
            }
        )
    )
    assert trainer.args.device.type == DEVICE
    for callback in callbacks:
        trainer.add_callback(callback)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.train(resume)
    after = dict(trainer.model.named_parameters())
    same = [name for name, one in before.items() if torch.equal(one.to(DEVICE), after[name])]
    assert not same or resume
    history = trainer.state.log_history
    return [entry["loss"] for entry in history if "loss" in entry], history


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(family_folder, tmp_path, precision, checkpointing):
    model = {"gradient_checkpointing": checkpointing}
    options = {"grad_cache": True, "token_budget": 64, "save_strategy": "no"}
    exact, _ = run(tmp_path / "exact", family_folder("qwen3"), model=model, **options)
    found, _ = run(tmp_path / "half", family_folder("qwen3"), model=model, **options, **{precision: True})
    assert len(found) == 4
    assert found == pytest.approx(exact, abs=0.1 if precision == "bf16" else 0.5)  # a loss scaler may drop first steps
    assert found[0] == pytest.approx(exact[0], abs=2e-2)


class Reseed(TrainerCallback):
    """Other random numbers from step 3 on."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            torch.manual_seed(99)


def test_a_resumed_run_draws_the_same_dropout(family_folder, tmp_path):
    """Kernels may add in another order each time, so equal is what is much nearer than a run that draws others."""
    options = {"adapter": LORA, "token_budget": 64, "learning_rate": 5e-3, "save_steps": 2}
    whole, _ = run(tmp_path / "run", family_folder("qwen3"), **options)
    other, _ = run(tmp_path / "other", family_folder("qwen3"), callbacks=[Reseed()], **options)
    torch.manual_seed(99)
    checkpoint = str(tmp_path / "run" / "out" / "checkpoint-2")
    resumed, _ = run(tmp_path / "run", family_folder("qwen3"), resume=checkpoint, **options)
    assert resumed[:2] == whole[:2]  # of the checkpoint's log
    assert abs(other[2] - whole[2]) > 1e-2
    assert abs(resumed[2] - whole[2]) < abs(other[2] - whole[2]) / 20


def test_pictures_are_trained_on(family_folder, tmp_path):
    losses, _ = run(
        tmp_path / "run",
        family_folder("qwen3_vl"),
        pictures=True,
        adapter={"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
        bf16=True,
        save_strategy="no",
    )
    assert np.isfinite(losses).all()


class Limit(TrainerCallback):
    """From the first step on the allocator refuses what is beyond so many megabytes, in earnest."""

    def __init__(self, megabytes):
        self.megabytes = megabytes

    def on_train_begin(self, *_, **__):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + self.megabytes * 2**20) / total)

    def on_train_end(self, *_, **__):
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_without_memory_is_taken_again(family_folder, tmp_path):
    """The chunks are halved until they fit, and the losses are those of the run that had the memory."""
    options = {
        "records": 256,
        "words": 400,
        "per_device_train_batch_size": 128,
        "max_steps": 2,
        "token_budget": 10**6,
        "save_strategy": "no",
    }
    torch.cuda.reset_peak_memory_stats()
    exact, history = run(tmp_path / "all", family_folder("qwen3"), **options)
    needed = torch.cuda.max_memory_allocated() / 2**20
    assert not [entry for entry in history if "chunk_tokens" in entry]
    try:
        found, history = run(tmp_path / "less", family_folder("qwen3"), callbacks=[Limit(needed / 2)], **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    halved = [entry["chunk_tokens"] for entry in history if "chunk_tokens" in entry]
    assert halved and halved == sorted(halved, reverse=True)
    assert found == pytest.approx(exact, rel=1e-2)
    assert found[0] == pytest.approx(exact[0], rel=1e-4)
