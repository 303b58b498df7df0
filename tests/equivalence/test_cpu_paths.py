"""Every path that CPU inference may take, whatever processor runs the tests: padded rows, packed ones, shared prefixes.

Which path is taken follows from what the processor says that it can do; here it is told what to say. bfloat16 runs on
any, only slower.
"""

import pytest
import torch

from mmembed.backbones import attention
from mmembed.inference import cpu, decoder
from mmembed.inference.cpu import ATTENTION, OneDnnLinear, accelerate
from mmembed.inference.elementwise import Quick
from tests.equivalence.layouts import built, random_rows, watch

PROCESSORS = {
    "amx": {"cpu_name": "Intel", "avx512_bf16": True, "amx_bf16": True},
    "avx512": {"cpu_name": "Intel", "avx512_bf16": True, "amx_bf16": False},
    "amd": {"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False},
    "old": {"cpu_name": "Intel", "avx512_bf16": False, "amx_bf16": False},
    "unknown": {},
}
HEAD = tuple(range(10, 50))
LAYOUTS = {  # attention, lengths, what the rows begin with, options of `collate`
    "padded": ("causal", (90, 40, 17, 3), (), {}),  # behind, so there is no mask
    "packed": ("causal", (90, 40, 17, 16, 3, 1), (), {"packed": True}),
    "behind a prefix": ("causal", (50, 40, 17, 3), HEAD, {"shared": len(HEAD)}),
    "masked": ("bidirectional", (90, 40, 17, 3), (), {}),
    "whole": ("bidirectional", (90, 90), (), {}),
}
OWN_BLOCKS = ("avx512", "amd")


@pytest.fixture
def run_on(monkeypatch):
    """run_on("amx"): from here on, models are prepared for that processor. Then the machine's own path is back."""
    from transformers import AttentionInterface

    known = AttentionInterface._global_mapping  # of the process: models prepared by other tests look there
    monkeypatch.setitem(known, ATTENTION, known.get(ATTENTION, cpu.attend))
    return lambda name: monkeypatch.setattr(cpu, "cpu_capabilities", lambda: PROCESSORS[name])


def key_lengths(monkeypatch):
    """Of the calls of torch's fused kernel from here on."""
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *given, **options):
        seen.append(key.shape[2])
        return kernel(query, key, value, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3_text"])
def test_vectors(family_folder, name, layout, processor, run_on, monkeypatch):
    """As near to float32 as the stock kernels are in bfloat16; mistral and gemma have windows of 16 tokens and more."""
    mode, lengths, head, options = LAYOUTS[layout]
    rows = random_rows(lengths, head=head)
    (exact, preprocessor), (plain, _), (ours, _) = (
        built(family_folder(name), dtype=dtype, attention=mode) for dtype in ("float32", "bfloat16", "bfloat16")
    )
    run_on(processor)
    accelerate(ours.backbone)
    laid_out = watch(monkeypatch, attention, "attend_packed"), watch(monkeypatch, attention, "attend_behind")
    with torch.inference_mode():
        expected, stock = (model(preprocessor.collate(rows)).vectors.float() for model in (exact, plain))
        blocks, keys = watch(monkeypatch, cpu, "_blocked_attention"), key_lengths(monkeypatch)
        found = ours(preprocessor.collate(rows, **options)).vectors.float()
    assert (found - expected).abs().max() < 2 * (stock - expected).abs().max() + 4e-3
    assert [len(calls) for calls in laid_out] == [2 * (layout == "packed"), 2 * (layout == "behind a prefix")]
    if name != "qwen3":  # what windows leave to our kernels differs by layer
        return
    own = {"padded": 2, "whole": 2, "behind a prefix": 4}.get(layout, 0) if processor in OWN_BLOCKS else 0
    assert len(blocks) == own, "in each of two layers; the prefix and what is behind it are one call each"
    if not options:
        aligned = processor == "amx" and layout == "padded"
        assert keys == ([] if own else [96 if aligned else 90] * 2)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products in oneDNN")
@pytest.mark.parametrize("layout", ["padded", "packed", "behind a prefix"])
def test_matrix_units_compute_whole_layers(family_folder, layout, run_on, monkeypatch):
    mode, lengths, head, options = LAYOUTS[layout]
    decoded = watch(monkeypatch, decoder, "_decode")
    for processor, layers in (("avx512", 0), ("amx", 2)):
        model, preprocessor = built(family_folder("qwen3"), dtype="bfloat16", attention=mode)
        run_on(processor)
        accelerate(model.backbone)
        decoded.clear()
        with torch.inference_mode():
            model(preprocessor.collate(random_rows(lengths, head=head), **options))
        assert len(decoded) == layers


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("shared", [0, len(HEAD)])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3_text"])
def test_float32_computes_no_scores_of_later_blocks(family_folder, name, shared, processor, run_on, monkeypatch):
    """Long rows in blocks of 64 queries; where there is a window, and behind a short prefix, as the stock."""
    rows = random_rows((200, 170, 3), head=HEAD[:shared])
    (plain, preprocessor), (ours, _) = (built(family_folder(name)) for _ in range(2))
    run_on(processor)
    accelerate(ours.backbone)
    with torch.inference_mode():
        expected = plain(preprocessor.collate(rows)).vectors
        keys = key_lengths(monkeypatch)
        found = ours(preprocessor.collate(rows, shared=shared)).vectors
    assert torch.allclose(found, expected, atol=1e-5)
    if name == "qwen3":
        blocks = [shared + stop for stop in (64, 128, 192, 200)]
        assert keys == [*([shared] if shared else []), *blocks] * 2


def test_float32_with_gradients_is_the_stock(family_folder, run_on, monkeypatch):
    model, preprocessor = built(family_folder("qwen3"))
    run_on("unknown")
    accelerate(model.backbone)
    keys = key_lengths(monkeypatch)
    model(preprocessor.collate(random_rows((200, 170)))).vectors.sum().backward()
    assert keys == [200] * 2


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(family_folder, layout, processor, run_on):
    """Rounding apart, the stock vectors: products of oneDNN on AMD, norms and rotations in blocks on all."""
    mode, lengths, head, options = LAYOUTS[layout]
    rows = random_rows(lengths, head=head)
    (plain, preprocessor), (ours, _) = (built(family_folder("qwen3"), attention=mode) for _ in range(2))
    run_on(processor)
    accelerate(ours.backbone)
    products = [module for module in ours.backbone.modules() if isinstance(module, torch.nn.Linear)]
    assert products and all(isinstance(module, OneDnnLinear) == (processor == "amd") for module in products)
    assert any(isinstance(module, Quick) for module in ours.backbone.modules())
    with torch.inference_mode():
        expected = plain(preprocessor.collate(rows)).vectors
        found = ours(preprocessor.collate(rows, **options)).vectors
    assert torch.allclose(found, expected, atol=1e-5)
