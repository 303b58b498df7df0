"""What a run's options do to the trainer: which optimizer steps, what is recomputed, what a batch is drawn from."""

import json
import re

import bitsandbytes
import pytest
import torch
import transformers

from mmembed.config import load_config
from mmembed.data.collate import content_key
from mmembed.errors import ConfigError
from mmembed.training.optimizers import Lion
from recipes.train_embedder import main
from tests.runs import build_trainer

INSTRUCTION = "Find the one that a reader would look for after this question"


@pytest.mark.parametrize(
    ("overrides", "kind", "expected"),
    [
        ([], torch.optim.AdamW, {"betas": (0.9, 0.999), "fused": True}),
        (["training.optimizer=adamw", "training.adam_beta2=0.95"], torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        (["training.optimizer=lion"], Lion, {"betas": (0.9, 0.99)}),
        (["training.optimizer=lion", "training.adam_beta1=0.95"], Lion, {"betas": (0.95, 0.99)}),
        (["training.optimizer=lion", "training.adam_beta2=0.98"], Lion, {"betas": (0.9, 0.98)}),
        (
            ["training.optimizer=adafactor"],
            transformers.optimization.Adafactor,
            {"relative_step": False, "scale_parameter": False, "lr": 1e-2},
        ),
        (["training.optim=sgd"], torch.optim.SGD, {"momentum": 0}),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_the_optimizer_is_the_one_that_is_named(config_file, overrides, kind, expected):
    optimizer = build_trainer(load_config(config_file, [*overrides, "data.dev=[]"])).create_optimizer()
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_adamw_8bit_keeps_its_moments_in_8_bits(config_file):
    """Of tensors of 4,096 values and more; of embeddings in 32 (docstring of mmembed.training.optimizers)."""
    trainer = build_trainer(
        load_config(config_file, ["training.optimizer=adamw_8bit", "adapter={type: none}", "data.dev=[]"])
    )
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, bitsandbytes.optim.AdamW)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    optimizer.step()
    tables = {id(part.weight) for part in trainer.model.modules() if isinstance(part, torch.nn.Embedding)}
    moments = {True: set(), False: set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel() >= 4096:
                moments[id(parameter) in tables].add(optimizer.state[parameter]["state1"].dtype)
    assert moments == {False: {torch.uint8}, True: {torch.float32}}


def test_a_shared_prefix_follows_the_same_trajectory(config_file, tmp_path, capsys):
    """Text and pictures behind an instruction, four steps and dev evaluation."""
    instruct = [
        "prompt=instruct",
        "adapter.dropout=0.0",
        "training.eval_strategy=steps",
        "training.eval_steps=4",
        *(
            f"data.{part}=[{', '.join(f'{{path: {name}, instruction: {INSTRUCTION}}}' for name in names)}]"
            for part, names in (("train", ("text.jsonl", "pictures.jsonl")), ("dev", ("dev.jsonl",)))
        ),
    ]
    found = {}
    for share in ("auto", "off"):
        out = tmp_path / share
        options = [*instruct, f"training.share_prefix={share}", f"training.output_dir={out}"]
        assert main(["--config", str(config_file), *options]) == 0
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found[share] = [entry[key] for entry in history for key in ("loss", "eval_ndcg_at_10") if key in entry]
        report = capsys.readouterr().out
        assert ("begin alike" in report) == (share == "auto")
        assert ("training.share_prefix is off" in report) == (share == "off")
    assert len(found["off"]) == 5
    assert found["auto"] == pytest.approx(found["off"], rel=1e-4)


def test_packed_texts_follow_the_same_trajectory(config_file, tmp_path, capsys):
    """Text and pictures, four steps and dev evaluation; `auto` stays padded where there is no kernel."""
    options = ["prompt=instruct", "adapter.dropout=0.0", "training.eval_strategy=steps", "training.eval_steps=4"]
    found = {}
    for kernel in ("packed", "padded", "auto"):
        out = tmp_path / kernel
        given = [*options, f"training.attention_kernel={kernel}", f"training.output_dir={out}"]
        assert main(["--config", str(config_file), *given]) == 0
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found[kernel] = [entry[key] for entry in history for key in ("loss", "eval_ndcg_at_10") if key in entry]
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("padding: ")]
        assert {"packed": "none is computed", "padded": "is padded", "auto": "float32"}[kernel] in line
    assert len(found["padded"]) == 5
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-4)
    assert found["auto"] == found["padded"]


def test_packing_that_cannot_be_is_refused(config_file):
    options = ["training.attention_kernel=packed", "model.attn_implementation=eager", "data.dev=[]"]
    with pytest.raises(ConfigError, match=r"'packed' cannot be \(attn_implementation is 'eager'"):
        build_trainer(load_config(config_file, options))


def test_a_vision_cache_follows_the_same_trajectory(config_file, tmp_path, capsys):
    """LoRA on pictures, two epochs of one batch and dev evaluation: the tower runs once a picture, then not at all."""
    options = ["data.train=[{path: pictures.jsonl}]", "data.dev=[{path: pictures.jsonl, name: dev}]"]
    options += ["training.eval_strategy=steps", "training.eval_steps=4"]
    options += ["adapter.dropout=0.0", "training.token_budget=64"]
    found = {}
    for where in ("off", str(tmp_path / "cache"), str(tmp_path / "cache")):
        given = [*options, f"training.vision_cache={where}", f"training.output_dir={tmp_path / 'run'}"]
        assert main(["--config", str(config_file), *given]) == 0
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        values = [entry[key] for entry in history for key in ("loss", "eval_ndcg_at_10") if key in entry]
        line = next(line for line in capsys.readouterr().out.splitlines() if "image features" in line)
        found.setdefault("lines", []).append(line)
        assert values == pytest.approx(found.setdefault("values", values), rel=1e-6)
    assert len(found["values"]) == 5
    assert "not kept (training.vision_cache is off)" in found["lines"][0]
    kept = [line.split(" in ")[0] for line in found["lines"][1:]]
    assert kept == ["image features: 0", "image features: 11"]  # ten, and the one that checks what was saved


def test_a_vision_cache_of_what_is_trained(config_file, tmp_path, capsys):
    """Insisted on it is refused; `auto` says why and goes on."""
    options = ["adapter={type: none}", "data.dev=[]", "training.max_steps=2"]
    assert main(["--config", str(config_file), *options, f"training.vision_cache={tmp_path / 'cache'}"]) == 2
    error = capsys.readouterr().err
    assert "projector is trained" in error and "model.freeze: [audio, projector, vision]" in error
    assert main(["--config", str(config_file), *options, "training.vision_cache=auto"]) == 0
    assert "image features: not kept (the projector is trained" in capsys.readouterr().out
    assert main(["--config", str(config_file), *options, "training.vision_cache_gb=3"]) == 2
    assert "no effect with vision_cache 'off'" in capsys.readouterr().err


def test_gradient_checkpointing_runs_each_decoder_layer_twice(config_file):
    """The option reaches the model; that it changes no gradient is in tests/unit/test_adapters.py.

    Counted at the first module inside a layer: the layer's own hooks are not run again, and torch stops the second run
    as soon as it has what the backward pass needs.
    """
    calls = {}
    for on in ("false", "true"):
        options = ["data.dev=[]", "training.grad_cache=false", f"model.gradient_checkpointing={on}"]
        trainer = build_trainer(load_config(config_file, options))
        trainer.current_gradient_accumulation_steps = 1
        layers = [module for module in trainer.model.modules() if type(module).__name__ == "Qwen3VLTextDecoderLayer"]
        assert len(layers) == 2
        count = [0]
        layers[0].input_layernorm.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.training_step(trainer.model, batch)
        assert count[0] == len(batch.chunks) * (2 if on == "true" else 1)
        calls[on] = count[0]
    assert calls["true"] == 2 * calls["false"]


@pytest.mark.parametrize(
    ("sources", "alpha", "expected"),  # of 6 batches of 8: 40 and 10 rows are 5 whole batches and 1
    [
        (("", ""), 1, (5, 1)),  # 40 : 10
        (("", ""), 0.5, (4, 2)),  # 6.3 : 3.2
        (("", ""), 0, (3, 3)),
        ((", weight: 1", ", weight: 1"), 1, (3, 3)),
        ((", weight: 1", ", weight: 5"), 1, (1, 5)),
    ],
)
def test_sources_are_drawn_by_weight_and_alpha(config_file, sources, alpha, expected):
    train = f"[{{path: text.jsonl{sources[0]}}}, {{path: pictures.jsonl{sources[1]}}}]"
    options = [f"data.train={train}", f"data.mixing_alpha={alpha}", "data.dev=[]"]
    assert build_trainer(load_config(config_file, options)).plan.batches_per_source == expected


def test_records_that_share_a_positive_do_not_meet_in_a_batch(config_file, tmp_path):
    """Each would be the other's false negative. 16 records, 8 positives, two batches of 8."""
    records = [{"query": f"query {index}", "documents": [{"content": f"document {index // 2}"}]} for index in range(16)]
    file = tmp_path / "twins.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = build_trainer(load_config(config_file, [f"data.train=[{{path: {file}}}]", "data.dev=[]"]))
    batches = list(trainer.plan)
    assert len(batches) == 2
    for batch in batches:
        positives = [content_key(trainer.train_dataset[draw].documents[0].content) for draw in batch]
        assert len(set(positives)) == len(positives) == 8


@pytest.mark.parametrize(("in_batch", "negatives"), [("false", 1), ("true", 15)])
def test_in_batch_negatives_of_a_source_are_on_or_off(config_file, tmp_path, in_batch, negatives):
    """8 queries, a positive and a hard negative each: compared with its own negative, or with all others' too."""
    source = f"data.train=[{{path: text.jsonl, in_batch_negatives: {in_batch}}}]"
    assert main(["--config", str(config_file), source, "data.dev=[]", "training.max_steps=2"]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    found = [entry["negatives"] for entry in history if "negatives" in entry]
    assert found == [negatives] * 2


def test_in_batch_negatives_off_and_no_negatives_is_refused(config_file, capsys):
    source = "data.train=[{path: pictures.jsonl, in_batch_negatives: false}]"
    assert main(["--config", str(config_file), source, "data.dev=[]"]) == 2
    error = capsys.readouterr().err
    assert "pictures.jsonl" in error and "loss is always 0" in error and "in_batch_negatives: true" in error


def test_a_run_that_diverges_ends_with_its_source_and_objective(config_file, tmp_path, capsys):
    run = ["data.train=[{path: text.jsonl}]", "data.dev=[]", "training.max_steps=4", "training.save_steps=1"]
    run += ["training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0"]
    assert main(["--config", str(config_file), *run, "training.save_strategy=steps"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"source '[^']+', objective 'infonce': the (vectors|loss) of a batch (are|is) not finite", error)
    assert "Traceback" not in error
