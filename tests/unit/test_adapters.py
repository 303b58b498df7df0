"""Adapters: each kind trains what it should, leaves the rest alone, and comes back from disk."""

from __future__ import annotations

import math
import re

import pytest
import torch
from families import build, items, picture, vectors

from mmembed.content import to_content
from mmembed.errors import ConfigError
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.verification import verify_checkpoint
from mmembed.preprocess import Item

BLOCK = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "num_virtual_tokens": 5, "quant_type": "nf4"}
CASES = [(kind, "qwen3") for kind in ("lora", "dora", "rslora", "qlora", "prefix", "prompt", "none")]
CASES += [(kind, "qwen2_vl") for kind in ("dora", "qlora", "none")] + [("qlora", "smolvlm"), ("prefix", "llama")]


def train_a_step(model, preprocessor, batch) -> set[str]:
    """One large step away from parallel vectors; returns the names of trained parameters."""
    model.train()
    produced = model(preprocessor(batch)).vectors
    (produced @ produced.T).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(parameter.grad is not None for parameter in trained.values())
    torch.optim.SGD(trained.values(), lr=0.5).step()
    model.eval()
    return set(trained)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_trains_saves_and_reloads(kind: str, family: str, family_folder, tmp_path) -> None:
    torch.manual_seed(0)
    model, preprocessor = build(
        family_folder(family), adapter={**BLOCK, "type": kind}, prompt="instruct", pooling="mean"
    )
    batch = items(family)
    before = vectors(model, preprocessor, batch)
    trained = train_a_step(model, preprocessor, batch)
    towers = {model.parameter_towers()[name] for name in trained}
    assert towers == ({"language", "projector"} if kind == "none" and family == "qwen2_vl" else {"language"})
    after = vectors(model, preprocessor, batch)
    assert (before - after).abs().max() > 1e-4
    alone = torch.cat([vectors(model, preprocessor, [item]) for item in batch])
    assert torch.allclose(after, alone, atol=1e-5)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) < 1e-6
    assert torch.allclose(after, vectors(*load_checkpoint(tmp_path / "saved"), batch), atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "qlora", "prefix"])
def test_merging_changes_speed_not_vectors_and_not_the_file(kind: str, family_folder, tmp_path) -> None:
    torch.manual_seed(0)
    model, preprocessor = build(family_folder("qwen3"), adapter={**BLOCK, "type": kind})
    train_a_step(model, preprocessor, items("qwen3"))
    apart = vectors(model, preprocessor, items("qwen3"))
    model.merge_adapter()
    assert torch.allclose(apart, vectors(model, preprocessor, items("qwen3")), atol=1e-5)
    if kind in ("lora", "dora", "rslora"):
        assert all(module.merged for name, module in model.named_modules() if name.endswith("q_proj"))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert torch.allclose(apart, vectors(*load_checkpoint(tmp_path / "saved"), items("qwen3")), atol=1e-6)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) < 1e-5


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "idefics3", "gemma3", "paligemma"]
)
def test_virtual_tokens_in_front_of_images(kind: str, family: str, family_folder, tmp_path) -> None:
    """Batched equals alone: positions, masks and token types survive the virtual tokens; gradients arrive."""
    if kind == "prefix" and family in ("gemma3", "paligemma"):
        with pytest.raises(ConfigError, match="use 'prompt' or 'lora'"):
            build(family_folder(family), adapter={**BLOCK, "type": kind})
        return
    torch.manual_seed(0)
    model, preprocessor = build(family_folder(family), adapter={**BLOCK, "type": kind})
    batch = items(family)
    assert train_a_step(model, preprocessor, batch)
    together = vectors(model, preprocessor, batch)
    alone = torch.cat([vectors(model, preprocessor, [item]) for item in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) < 1e-6


def test_qlora_is_four_bit_and_close_to_full_precision(family_folder) -> None:
    import bitsandbytes as bnb

    for family in ("qwen3", "qwen2_vl"):
        quantized, preprocessor = build(family_folder(family), adapter={**BLOCK, "type": "qlora"})
        layers = [name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 14  # 7 linear layers in each of 2 decoder layers
        assert not any("visual" in name for name in layers)
        full, _ = build(family_folder(family))
        cosine = (vectors(quantized, preprocessor, items(family)) * vectors(full, preprocessor, items(family))).sum(1)
        assert 0.9 < cosine.min() < 0.99999


def test_qlora_gradients_survive_an_evaluation(family_folder) -> None:
    """bitsandbytes repacks its weights in evaluation mode on the CPU; the next training step would lose gradients."""
    gradients = []
    for evaluate_first in (False, True):
        torch.manual_seed(0)
        model, preprocessor = build(family_folder("qwen3"), adapter={**BLOCK, "type": "qlora"})
        if evaluate_first:
            vectors(model, preprocessor, items("qwen3"))
        model.train()
        model(preprocessor(items("qwen3"))).vectors[0, :9].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_rank_stabilised_scale_and_dora_magnitude(family_folder) -> None:
    scales = {}
    for kind in ("lora", "rslora", "dora"):
        model, _ = build(family_folder("qwen3"), adapter={**BLOCK, "type": kind})
        scales[kind] = {
            module.scaling["default"] for name, module in model.named_modules() if re.search(r"q_proj$", name)
        }
        assert (kind == "dora") == any("magnitude" in name for name, _ in model.named_parameters())
    assert scales == {"lora": {2.0}, "rslora": {8 / math.sqrt(4)}, "dora": {2.0}}


def test_gaussian_init_is_normal_of_deviation_one_over_the_rank(family_folder) -> None:
    """SaHa's setting, as in peft: A normal of deviation 1/r, B zero. By default A is uniform within 1/sqrt(inputs)."""
    for init in (None, "gaussian"):
        torch.manual_seed(0)
        block = {**BLOCK, "type": "lora", "r": 16, **({"init": init} if init else {})}
        model, _ = build(family_folder("qwen3"), adapter=block)
        named = dict(model.named_parameters())
        first = {name: tensor for name, tensor in named.items() if "lora_A" in name}
        assert first
        assert all(not tensor.any() for name, tensor in named.items() if "lora_B" in name)
        for name, tensor in first.items():
            bound = 1 / math.sqrt(tensor.shape[1])
            if init == "gaussian":
                assert tensor.std().item() == pytest.approx(1 / 16, rel=0.1), name
                assert tensor.abs().max() > 2.5 / 16, name  # a tail that no uniform draw of this spread has
            else:
                assert tensor.abs().max() <= bound, name
                assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


@pytest.mark.parametrize(
    ("targets", "freeze", "expected"),
    [
        ("auto", ("vision",), {"language"}),
        ("all-linear", ("vision",), {"language", "projector"}),
        ("all-linear", ("vision", "projector"), {"language"}),
        ("auto", (), {"language", "vision"}),
        ("all-linear", ("language",), {"vision", "projector"}),
        (["q_proj", "v_proj"], ("vision",), {"language"}),
    ],
)
def test_lora_reaches_the_towers_that_are_free(targets, freeze, expected, family_folder) -> None:
    for family in ("qwen3_vl", "gemma3", "smolvlm", "llava_onevision"):
        possible = expected - {"projector"} if family == "gemma3" else expected  # its projector is no linear layer
        block = {**BLOCK, "type": "lora", "target_modules": targets}
        model, _ = build(family_folder(family), adapter=block, freeze=freeze)
        towers = model.parameter_towers()
        assert {towers[name] for name, parameter in model.named_parameters() if parameter.requires_grad} == possible


@pytest.mark.parametrize("freeze", [(), ("vision",), ("vision", "language"), ("projector",)])
def test_frozen_towers_of_full_training(freeze, family_folder) -> None:
    for family in ("qwen2_5_vl", "gemma3", "idefics3", "paligemma"):
        model, _ = build(family_folder(family), freeze=freeze)
        towers = model.parameter_towers()
        free = {towers[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        held = {towers[name] for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert held == set(freeze)
        assert free == {"vision", "projector", "language"} - set(freeze)


def test_gradient_checkpointing_changes_no_gradient(family_folder) -> None:
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model, preprocessor = build(family_folder("qwen3_vl"), adapter={**BLOCK, "type": "lora"})
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        batch = [Item(to_content({"image": picture(1), "text": "a"})), Item(to_content("b c d"))]
        model(preprocessor(batch)).vectors[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert gradients[0]
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*gradients, strict=True))


def test_refusals_name_the_remedy(family_folder) -> None:
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        build(family_folder("qwen3"), adapter={**BLOCK, "type": "lora", "target_modules": ["q_prj"]})
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        build(family_folder("qwen3"), adapter={**BLOCK, "type": "lara"})
    with pytest.raises(ConfigError, match="leaves no linear layer"):
        build(family_folder("qwen3"), adapter={**BLOCK, "type": "lora"}, freeze=("language",))
