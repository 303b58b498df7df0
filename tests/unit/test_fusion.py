"""Fusion: what is written is the sum that the rule says, of what each model is worth, and loads like any other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, build, items, vectors
from safetensors.torch import load_file

from mmembed import Embedder, Reranker
from mmembed.cli import main
from mmembed.errors import CheckpointError, ConfigError
from mmembed.fusion.fuse import fuse
from mmembed.fusion.rules import RULES
from mmembed.fusion.soup import select
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}
SHAPE = (3, 4)


def moved(folder: Path, destination: Path, seed: int, **settings: object) -> Path:
    """A saved model whose trained parameters were moved at random."""
    torch.manual_seed(seed)
    model, preprocessor = build(folder, **{"adapter": LORA, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_checkpoint(destination, model, preprocessor)
    return destination


@pytest.fixture(scope="module")
def models(family_folder, tmp_path_factory):
    """Two adapters and a whole model of one backbone; `start` is that backbone."""
    root, start = tmp_path_factory.mktemp("models"), family_folder("qwen3")
    return {
        "start": start,
        "a": moved(start, root / "a", 1),
        "b": moved(start, root / "b", 2),
        "whole": moved(start, root / "whole", 3, adapter=None),
    }


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in float32 by their names in the model, an adapter's merged by peft."""
    model, _ = load_checkpoint(folder, dtype="float32")
    backbone = model.backbone if model.settings.adapter_type == "none" else model.backbone.merge_and_unload()
    heads = {name: one for name, one in model.state_dict().items() if not name.startswith("backbone.")}
    return {name: one.detach().clone() for name, one in backbone.state_dict().items()} | heads


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance, name


# Rules ----------------------------------------------------------------------------------------------------------------


def random_tensors(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(SHAPE, generator=generator)
    return base, [base + torch.randn(SHAPE, generator=generator) * 0.3 for _ in range(count)]


def by_loops(rule: str, options: dict, base: np.ndarray, tensors: list[np.ndarray]) -> np.ndarray:
    """The equations, number by number in float64; linear, slerp and task_vectors as mergekit has them."""
    result = np.zeros(SHAPE)
    flat = [tensor.ravel() for tensor in tensors]
    if rule == "slerp":
        one, two = flat
        cosine = sum(x * y for x, y in zip(one, two, strict=True)) / math.sqrt(sum(one**2) * sum(two**2))
        angle, t = math.acos(cosine), options.get("t", 0.5)
        shares = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    elif rule == "delta_guided":
        norms = [math.sqrt(sum((tensor - base).ravel() ** 2)) for tensor in tensors]
        shares = [norm / sum(norms) for norm in norms]
    else:
        given = options.get("weights", [1.0] * len(tensors))
        total = 1 if rule == "task_vectors" else sum(given)
        shares = [weight / total for weight in given]
    for index in np.ndindex(SHAPE):
        if rule == "task_vectors":
            result[index] = base[index] + sum(
                w * (t[index] - base[index]) for w, t in zip(shares, tensors, strict=True)
            )
        else:
            result[index] = sum(w * t[index] for w, t in zip(shares, tensors, strict=True))
    return result


@pytest.mark.parametrize(
    ("rule", "options", "count"),
    [
        ("uniform", {}, 3),
        ("linear", {"weights": [3.0, 1.0, 0.5]}, 3),
        ("slerp", {"t": 0.3}, 2),
        ("slerp", {}, 2),
        ("task_vectors", {}, 2),
        ("task_vectors", {"weights": [1.0, -0.5, 2.0]}, 3),
        ("delta_guided", {}, 3),
    ],
)
def test_a_rule_is_its_equation(rule, options, count):
    base, tensors = random_tensors(count)
    built = RULES.build({"type": rule, **options})
    built.check(count)
    before = [tensor.clone() for tensor in tensors]
    found = built.combine(base, tensors, built.weights("x", base, tensors))
    expected = by_loops(rule, options, base.double().numpy(), [tensor.double().numpy() for tensor in tensors])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert all(tensor.equal(old) for tensor, old in zip(tensors, before, strict=True))


def test_slerp_of_models_that_are_alike_is_the_chord():
    base, _ = random_tensors(2)
    assert RULES.build({"type": "slerp", "t": 0.25}).weights("x", None, [base, base * 1.0001]) == [0.75, 0.25]
    assert RULES.build("slerp").weights("x", None, [torch.zeros(3), torch.ones(3)]) == [0.5, 0.5]


@pytest.mark.parametrize("rule", ["uniform", "slerp", "delta_guided", {"type": "linear", "weights": [1.0, 7.0]}])
def test_two_equal_models_are_themselves_bit_by_bit(rule):
    base, (tensor, _) = random_tensors(2)
    built = RULES.build(rule)
    pair = [tensor, tensor.clone()]
    weights = built.weights("x", base, pair)
    found = built.combine(base, pair, weights)
    if built.relative:  # from the start and back
        assert (found - tensor).abs().max() < 1e-6
    else:
        assert found.equal(tensor)
    one = RULES.build({"type": "linear", "weights": [1.0, 0.0]})
    assert one.combine(None, [tensor, base], one.weights("x", None, [tensor, base])).equal(tensor)


@pytest.mark.parametrize(
    ("rule", "count", "message"),
    [
        ("unifrom", 2, "did you mean 'uniform'"),
        ({"type": "uniform", "t": 1.0}, 2, "unknown option 't'"),
        ({"type": "slerp", "t": 1.5}, 2, "rules.slerp.t"),
        ("slerp", 3, "3 models were given; it takes 2"),
        ("linear", 2, "the option 'weights' is missing"),
        ({"type": "linear", "weights": [1.0, -1.0]}, 2, "not above 0"),
        ({"type": "linear", "weights": [1.0]}, 2, "1 weights of 2 models"),
        ({"type": "task_vectors", "weights": [1.0]}, 2, "1 weights of 2 models"),
        ({"type": "atlas", "coefficients": {"x": [1.0]}}, 2, "learned for others"),
    ],
)
def test_a_rule_refuses_what_it_cannot_do(rule, count, message):
    with pytest.raises(ConfigError, match=message):
        RULES.build(rule).check(count)


def test_atlas_says_nothing_of_what_it_has_not_learned():
    base, (tensor, _) = random_tensors(2)
    rule = RULES.build({"type": "atlas", "coefficients": {"x": [2.0]}})
    assert rule.weights("y", base, [base]) == [0.0]
    with pytest.raises(ConfigError, match="nothing is said of 'y'"):
        rule.weights("y", base, [tensor])


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_is_worth_what_peft_merges(kind, models, tmp_path):
    adapter = moved(models["start"], tmp_path / "adapter", 5, adapter={**LORA, "type": kind})
    fuse([adapter], tmp_path / "fused")
    assert_near(state(tmp_path / "fused"), state(adapter))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fused_and_loads(family, family_folder, tmp_path):
    linear = {**LORA, "target_modules": "auto"}
    adapter = moved(family_folder(family), tmp_path / "adapter", 4, adapter=linear)
    whole = moved(family_folder(family), tmp_path / "whole", 6, adapter=None)
    fuse([adapter, whole], tmp_path / "fused", {"type": "linear", "weights": [1.0, 3.0]}, max_shard_size="100KB")
    one, two = state(adapter), state(whole)
    assert_near(state(tmp_path / "fused"), {name: 0.25 * one[name] + 0.75 * two[name] for name in one})
    fuse([whole], tmp_path / "same")
    batch = items(family)
    assert torch.equal(vectors(*load_checkpoint(tmp_path / "same"), batch), vectors(*load_checkpoint(whole), batch))


def test_products_are_averaged_not_factors(models, tmp_path):
    fuse([models["a"], models["b"]], tmp_path / "fused")
    a, b, found = state(models["a"]), state(models["b"]), state(tmp_path / "fused")
    assert_near(found, {name: (a[name] + b[name]) / 2 for name in a})
    factors = load_file(models["a"] / "adapter_model.safetensors"), load_file(models["b"] / "adapter_model.safetensors")
    layer = "layers.0.self_attn.q_proj"
    mean = [
        (factors[0][key] + factors[1][key]) / 2
        for key in (f"base_model.model.{layer}.lora_B.weight", f"base_model.model.{layer}.lora_A.weight")
    ]
    of_factors = state(models["start"])[f"{layer}.weight"] + 2 * mean[0] @ mean[1]
    assert (found[f"{layer}.weight"] - of_factors).abs().max() > 1e-3


def test_task_vectors_are_taken_away_again(models, tmp_path):
    fuse([models["a"], models["b"]], tmp_path / "sum", "task_vectors")
    start, a, b = (state(models[name]) for name in ("start", "a", "b"))
    assert_near(state(tmp_path / "sum"), {name: a[name] + b[name] - start[name] for name in start})
    taken = {"type": "task_vectors", "weights": [1.0, -1.0, -1.0]}
    fuse([tmp_path / "sum", models["a"], models["b"]], tmp_path / "back", taken)
    assert_near(state(tmp_path / "back"), start, 1e-6)


def test_the_record_says_what_was_fused(models, tmp_path):
    told = fuse([models["a"], models["whole"]], tmp_path / "fused", "delta_guided")
    assert told == json.loads((tmp_path / "fused" / "fusion.json").read_text())
    start, a, whole = (state(models[name]) for name in ("start", "a", "whole"))
    for name, weights in told["weights"].items():
        norms = [float((one[name] - start[name]).norm()) for one in (a, whole)]
        assert weights == pytest.approx([norm / sum(norms) for norm in norms], abs=1e-5), name
    assert told["weights"]["norm.weight"] == [0.0, 1.0]  # no adapter there
    other = fuse([models["b"], models["whole"]], tmp_path / "other")
    assert other["weights"] == [0.5, 0.5]
    assert other["models"][1] == told["models"][1] and other["models"][0] != told["models"][0]
    described = json.loads((tmp_path / "fused" / "mmembed.json").read_text())
    assert described["settings"]["name_or_path"] == str(models["start"]) and "fusion.json" in described["files"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_that_is_written_is_the_one_that_was_asked_for(dtype, models, tmp_path):
    fuse([models["a"], models["b"]], tmp_path / "fused", dtype=dtype)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert {str(one.dtype) for one in stored.values()} == {f"torch.{dtype}"}
    model, _ = load_checkpoint(tmp_path / "fused")
    assert str(model.dtype) == f"torch.{dtype}"


def test_pooling_and_projection_are_fused_too(models, tmp_path):
    settings = {"pooling": {"type": "latent_attention", "num_latents": 3}, "projection": 8}
    a = moved(models["start"], tmp_path / "a", 1, **settings)
    b = moved(models["start"], tmp_path / "b", 2, **settings)
    fuse([a, b], tmp_path / "fused")
    one, two = state(a), state(b)
    assert any(name.startswith("pooling.") for name in one) and "projection.weight" in one
    assert_near(state(tmp_path / "fused"), {name: (one[name] + two[name]) / 2 for name in one})
    with pytest.raises(ConfigError, match="--heads mean"):
        fuse([a, b], tmp_path / "sum", "task_vectors")
    fuse([a, b], tmp_path / "sum", "task_vectors", heads="mean")
    start, found = state(models["start"]), state(tmp_path / "sum")
    assert_near({name: found[name] for name in start}, {name: one[name] + two[name] - start[name] for name in start})
    heads = one.keys() - start.keys()
    assert_near({name: found[name] for name in heads}, {name: (one[name] + two[name]) / 2 for name in heads})
    vector = Embedder.from_pretrained(tmp_path / "sum").encode(["a red bus"])
    assert vector.shape == (1, 8) and np.isfinite(vector).all()
    with pytest.raises(ConfigError, match="--heads mean: has no effect"):
        fuse([a, b], tmp_path / "no", heads="mean")


def test_models_of_a_second_stage_are_weighed_from_the_first(models, tmp_path):
    """The start is the last thing that all come from: its tensors, not the bare backbone's, are taken away."""
    first = models["whole"]
    a, b = (moved(first, tmp_path / name, seed, adapter=None) for name, seed in (("a", 1), ("b", 2)))
    told = fuse([a, b], tmp_path / "sum", "task_vectors")
    assert told["base"]["path"] == str(first)
    one, two, start = state(a), state(b), state(first)
    assert_near(state(tmp_path / "sum"), {name: one[name] + two[name] - start[name] for name in start})
    fuse([a, b], tmp_path / "bare", "task_vectors", base=str(models["start"]))
    start = state(models["start"])
    assert_near(state(tmp_path / "bare"), {name: one[name] + two[name] - start[name] for name in start})


def test_rerankers_are_fused(models, tmp_path):
    settings = {"head": {"type": "linear"}, "pooling": "last_token", "prompt": "judge", "normalize": False}
    a, b = (moved(models["start"], tmp_path / name, seed, **settings) for name, seed in (("a", 1), ("b", 2)))
    fuse([a, b], tmp_path / "fused")
    one, two = state(a), state(b)
    assert_near(state(tmp_path / "fused"), {name: (one[name] + two[name]) / 2 for name in one})
    assert len(Reranker.from_pretrained(tmp_path / "fused").rank("a red bus", ["a bus", "a cat"])) == 2


def test_what_does_not_fit_is_refused_and_nothing_is_written(models, family_folder, tmp_path):
    def refused(message: str, *given: object, error: type[Exception] = CheckpointError, **options: object) -> None:
        with pytest.raises(error, match=message):
            fuse(list(given), tmp_path / "fused", **options)
        assert not (tmp_path / "fused").exists() and not list(tmp_path.glob(".fused*"))

    start, a = models["start"], models["a"]
    refused("is a bare backbone", a, start)
    pooled = moved(start, tmp_path / "pooled", 1, pooling="last_token", normalize=False)
    refused("differ in pooling .*mean.*last_token.*; normalize True and False", a, pooled)
    refused("neither|cannot load", a, tmp_path / "nothing")
    refused("'.*' of the backbone is", a, moved(family_folder("llama"), tmp_path / "llama", 1))
    prompt = {"type": "prompt", "num_virtual_tokens": 4}
    refused("adapter 'prompt' adds tokens", a, moved(start, tmp_path / "prompt", 1, adapter=prompt))
    refused("--dtype: there is no 'int8'", a, dtype="int8", error=ConfigError)
    refused("--max-shard-size", a, max_shard_size="many", error=ConfigError)
    refused("needs no start", a, base=str(start), error=ConfigError)
    with pytest.raises(ConfigError, match="is one of the models"):
        fuse([a, models["b"]], a)

    other = tmp_path / "other"
    shutil.copytree(start, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused("were trained from different backbones", a, moved(other, tmp_path / "of-other", 1))
    broken = moved(start, tmp_path / "broken", 1)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused("missing or broken", a, broken)


def test_a_copy_of_the_backbone_is_the_backbone(models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models["start"], copy)
    of_copy = moved(copy, tmp_path / "of-copy", 2)
    fuse([models["a"], of_copy], tmp_path / "fused")
    found = state(tmp_path / "fused")
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match="its backbone .* is not there.*--base"):
        fuse([models["a"], of_copy], tmp_path / "again")
    fuse([models["a"], of_copy], tmp_path / "again", base=str(models["start"]))
    assert_near(state(tmp_path / "again"), found, 0)


def test_numbers_that_are_not_finite_are_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="the fused tensor is too large for torch.float16"):
        fuse([models["a"]], tmp_path / "fused", {"type": "task_vectors", "weights": [1e9]}, dtype="float16")
    assert not (tmp_path / "fused").exists()


# Choosing and learning ------------------------------------------------------------------------------------------------


def test_a_greedy_soup_takes_ties_and_leaves_out_what_harms():
    scores = {(0,): 0.5, (1,): 0.7, (2,): 0.7, (1, 2): 0.7, (1, 2, 0): 0.69}
    found = select(3, lambda members: scores[tuple(members)])
    assert (found.order, found.chosen, found.tried, found.score) == ([1, 2, 0], [1, 2], [0.7, 0.69], 0.7)


def test_the_gradient_of_a_coefficient_is_that_of_the_graph():
    from mmembed.fusion.learning import Block

    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(4, 3, bias=False), torch.randn(5, 4)
    vectors = torch.randn(2, 3, 4)
    start, coefficients = layer.weight.detach().clone(), torch.tensor([0.3, -0.2])
    block = Block("weight", layer.weight, start, vectors, coefficients, torch.zeros(2))
    layer.weight.register_post_accumulate_grad_hook(block.collect)
    block.place()
    layer(inputs).pow(2).sum().backward()
    layer(inputs).sum().backward()  # chunks add up
    leaf = coefficients.clone().requires_grad_()
    output = inputs @ (start + torch.einsum("k,kij->ij", leaf, vectors)).T
    (output.pow(2).sum() + output.sum()).backward()
    torch.testing.assert_close(block.slopes, leaf.grad)
    assert layer.weight.grad is None


def test_coefficients_are_learned_from_records_and_given_again(models, tmp_path, capsys):
    pairs = [("a red bus", "The red bus in Prague."), ("cat", "The cat sat on the mat."), ("sun", "sunlight to sugar"),
             ("dog", "The dog slept in the garden."), ("capital", "Paris"), ("tag", "Der schöne Tag!"),
             ("one", "12345"), ("two", "67890")]  # fmt: skip
    records = tmp_path / "records.jsonl"
    lines = [{"query": query, "documents": [{"content": text, "relevance": 1}]} for query, text in pairs]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["fuse", str(models["a"]), str(models["whole"]), "--rule", "atlas"]
    setting = ["training.max_steps=6", "training.per_device_train_batch_size=8", "training.learning_rate=0.1"]
    learned = [*arguments, "--learn", str(records), "--set", *setting, "--device", "cpu"]
    assert main([*learned, "--output", str(tmp_path / "fused")]) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert told["losses"][-1] < told["losses"][0] and len(told["losses"]) == 6
    start, a, whole, found = (state(one) for one in (models["start"], models["a"], models["whole"], tmp_path / "fused"))
    changed = {name for name in start if not (a[name].equal(start[name]) and whole[name].equal(start[name]))}
    assert changed == set(told["weights"]) and all(any(pair) for pair in told["weights"].values())
    for name in changed:
        one, two = told["weights"][name]
        expected = start[name] + one * (a[name] - start[name]) + two * (whole[name] - start[name])
        assert (found[name] - expected).abs().max() < 1e-5, name

    kept = str(tmp_path / "fused" / "fusion.json")
    assert main([*arguments, "--coefficients", kept, "--output", str(tmp_path / "again")]) == 0
    assert_near(state(tmp_path / "again"), found, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--greedy", "--rule", "slerp"], "a greedy soup is a mean"),
        (["--tasks", "mbpp"], "--tasks: no effect without --greedy"),
        (["--greedy", "--weights", "1", "2"], "--weights: no effect on a greedy soup"),
        (["--learn", "x.jsonl"], "rule uniform learns nothing"),
        (["--rule", "atlas", "--set", "training.max_steps=1"], "--set: no effect without --learn"),
        (["--rule", "atlas", "--coefficients", "missing.json"], "not a file of learned coefficients"),
        (["--rule", "atlas"], "the option 'coefficients' is missing"),
        (["--weights", "1", "2"], "unknown option 'weights'; it takes no options"),
        (["--rule", "atlas", "--learn", "x.jsonl", "--set", "pooling=mean"], "pooling: comes from the models"),
        (
            ["--rule", "atlas", "--learn", "x.jsonl", "--set", "training.warmup_steps=3"],
            "has no effect on coefficients",
        ),
    ],
)
def test_options_without_an_effect_are_refused(arguments, message, models, tmp_path, capsys):
    given = ["fuse", str(models["a"]), str(models["b"]), "--output", str(tmp_path / "fused"), *arguments]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


def test_a_model_that_is_there_is_replaced_only_when_asked(models, tmp_path, capsys):
    arguments = ["fuse", str(models["a"]), str(models["b"]), "--output", str(tmp_path / "fused")]
    assert main(arguments) == 0
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--rule", "delta_guided", "--max-shard-size", "100KB", "--overwrite"]) == 0
    assert not (tmp_path / "fused" / "model.safetensors").exists()  # of the first
