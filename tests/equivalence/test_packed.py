"""Sequences that stand one behind the other give the vectors and gradients of padded rows."""

from functools import partial

import pytest
import torch
from families import FAMILIES, TEXT_FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmembed import Embedder
from mmembed.backbones import attention, packed
from mmembed.content import Text
from mmembed.data.collate import plan_chunks
from mmembed.errors import ConfigError, MmembedError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.preprocess import Item, Row
from tests.equivalence.layouts import (
    ALL_AT_ONCE,
    INSTRUCTION,
    LATENT,
    LORA,
    POOLINGS,
    built,
    cached,
    gradient,
    random_rows,
    watch,
)
from tests.equivalence.toy import relative

CPU = torch.device("cpu")


def assert_same(found, expected, tolerance=1e-5):
    if expected.mask is None:
        assert torch.allclose(found.vectors, expected.vectors, atol=tolerance)
    else:
        assert torch.equal(found.mask, expected.mask)
        assert torch.allclose(found.vectors[found.mask], expected.vectors[expected.mask], atol=tolerance)


def packable(name, mode):
    """Windows of bidirectional attention and PaliGemma's token types stay padded."""
    return name != "paligemma" and not (mode == "bidirectional" and name in ("mistral", "gemma3_text", "gemma3"))


@pytest.mark.parametrize("mode", [None, "bidirectional"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(family_folder, name, mode, monkeypatch):
    """Lengths on both sides of the windows of 16 and 64 tokens; where it cannot be, the reason is said."""
    model, preprocessor = built(family_folder(name), attention=mode)
    layers = watch(monkeypatch, attention, "attend_packed")
    rows = random_rows((90, 40, 17, 16, 3, 1))
    with torch.no_grad():
        plain, found = (model(preprocessor.collate(rows, packed=on)) for on in (False, True))
    assert_same(found, plain)
    assert len(layers) == (2 if packable(name, mode) else 0)
    if packable(name, mode):
        assert model.unpacked("packed", CPU, torch.float32) is None
    else:
        with pytest.raises(ConfigError, match="attention_kernel: 'packed' cannot be"):
            model.unpacked("packed", CPU, torch.float32)
        assert model.unpacked("auto", CPU, torch.float32)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(TEXT_FAMILIES),
    mode=st.sampled_from([None, "bidirectional"]),
    pooling=st.sampled_from(POOLINGS),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_any_lengths(family_folder, name, mode, pooling, lengths, side, seed):
    model, preprocessor = cached(family_folder(name), pooling, mode)
    rows = random_rows(lengths, seed)
    with torch.no_grad():
        assert_same(model(preprocessor.collate(rows, side, packed=True)), model(preprocessor.collate(rows)))


@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen3", {}),
        ("qwen3", {"attention": "bidirectional", "checkpointing": True}),
        ("qwen3", {"adapter": LORA, "attention": "bidirectional"}),
        ("qwen3", {"pooling": "multi_vector"}),
        ("qwen3", {"pooling": LATENT, "checkpointing": True}),
        ("qwen2", {"pooling": "weighted_mean", "attention": "bidirectional"}),
        ("llama", {"pooling": "last_token", "checkpointing": True}),
        ("mistral", {"checkpointing": True}),
        ("gemma3_text", {}),
        ("qwen3_vl", {"adapter": LORA}),
    ],
)
def test_gradients(family_folder, name, options):
    """Kept, recomputed, or in small chunks: equal losses and gradients to padded rows."""
    step = partial(gradient, family_folder(name), **options)
    loss, expected = step()
    assert expected.norm() > 0
    for chunk_tokens, keep_tokens in [(ALL_AT_ONCE, None), (150, 0), (150, 200)]:
        found_loss, found = step(chunk_tokens, keep_tokens, packed=True)
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert relative(found, expected) < 1e-5


def test_a_shared_prefix_wins(family_folder):
    """Chunks that share a prefix are computed as such; the gradient is the same."""
    step = partial(gradient, family_folder("qwen3"), packed=True, prompt="instruct")
    (loss, expected), (found_loss, found) = step(), step(share=True)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


def test_under_autocast(family_folder):
    """Norms and rotations leave float32 beside bfloat16 values; attention computes in bfloat16 as the stock one."""
    step = partial(gradient, family_folder("qwen3"), dtype=torch.bfloat16)
    (loss, expected), (found_loss, found) = step(), step(packed=True)
    assert found_loss.item() == pytest.approx(loss.item(), rel=2e-2)
    assert relative(found, expected) < 5e-2


def test_a_sequence_does_not_see_its_neighbours(family_folder):
    """The vector of a text is the same to the last bit, whatever stands before and behind it."""
    model, preprocessor = built(family_folder("qwen3"), attention="bidirectional")
    one, other, short = random_rows((20, 20, 5))
    with torch.no_grad():
        first = model(preprocessor.collate([one, short], packed=True)).vectors[0]
        second = model(preprocessor.collate([short, other, one], packed=True)).vectors[2]
    assert torch.allclose(first, second, atol=1e-6)


def test_a_packed_chunk_counts_its_tokens():
    rows = [Row([1] * length) for length in (9, 1, 1, 8)]
    padded, packed_ones = plan_chunks(rows, 20), plan_chunks(rows, 20, packed=True)
    assert [chunk.index.tolist() for chunk in padded] == [[0, 3], [1, 2]]
    assert [chunk.index.tolist() for chunk in packed_ones] == [[0, 3, 1, 2]]
    assert [chunk.padded_tokens for chunk in packed_ones] == [19]
    assert all(chunk.packed for chunk in packed_ones)


def test_hidden_states_that_are_padded_again_stay_small():
    """One long text among many short ones: 300 rows of 100 columns would be 75 budgets."""
    chunks = plan_chunks([Row([1] * length) for length in (100, *[1] * 300)], 400, packed=True)
    assert [len(chunk.rows) for chunk in chunks] == [8, 293]


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_encode(precision, tolerance):
    embedder = Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", dtype=precision)))
    texts = [f"{index} red buses in Prague " * (1 + index % 5) for index in range(40)]
    found, plain = (embedder.encode(texts, attention_kernel=kernel) for kernel in ("packed", "padded"))
    assert abs(found - plain).max() < tolerance
    assert abs(embedder.encode(texts) - plain).max() == 0  # a CPU has no kernel for it
    with pytest.raises(MmembedError, match="attention_kernel"):
        embedder.encode(texts, attention_kernel="flash")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"attn_implementation": "eager"}, "'eager'"),
        ({"adapter": {"type": "prefix", "num_virtual_tokens": 4}}, "'prefix'"),
        ({"adapter": {"type": "prompt", "num_virtual_tokens": 4}}, "'prompt'"),
    ],
)
def test_where_it_cannot_be(family_folder, options, reason):
    """The reason is said, and rows planned without padding are computed with it all the same."""
    model, preprocessor = built(family_folder("qwen3"), **options)
    assert reason in model.unpacked("auto", CPU, torch.bfloat16)
    rows = random_rows((20, 5))
    with torch.no_grad():
        plain, planned = (model(preprocessor.collate(rows, packed=on)).vectors for on in (False, True))
    assert torch.equal(plain, planned)


def test_reasons_of_a_config(family_folder):
    config = built(family_folder("qwen3"))[0].config
    assert packed.unknown(config, causal=True) is None
    assert "float32" in packed.no_kernel(config, CPU, torch.float32)
    assert "'cpu'" in packed.no_kernel(config, CPU, torch.bfloat16)
    config.attention_dropout = 0.1
    assert "attention_dropout" in packed.unknown(config, causal=True)
    config.attention_dropout, config.model_type = 0.0, "mamba"
    assert "'mamba'" in packed.unknown(config, causal=True)


def test_a_backbone_that_ignores_it_is_noticed(family_folder, monkeypatch):
    """As code brought by a model may: its attention takes the argument and does not look at it."""
    model, preprocessor = built(family_folder("qwen3"))
    monkeypatch.setattr(attention, "follows", lambda module, layout: False)
    with pytest.raises(MmembedError, match=r"0 of 2 layers .* attention_kernel: padded"):
        model(preprocessor.collate(random_rows((20, 5)), packed=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 16])
def test_the_call_of_the_kernel(causal, window, monkeypatch):
    """What torch's kernel is asked for, by a stand-in that does as its documentation says, against one by one."""

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_seq_q.dtype == torch.int32 and max_q == max_k == 30
        assert query.stride(-1) == 1 and query.shape[1] == 2 * key.shape[1]
        mixed = []
        for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            away = torch.arange(stop - start) - torch.arange(stop - start)[:, None]  # of a key from its query
            left, right = window_size
            seen = (away >= -left if left >= 0 else away < 99) & (away <= right if right >= 0 else away < 99)
            one, other, third = (tensor[start:stop].float() for tensor in (query, key, value))
            other, third = (tensor.repeat_interleave(2, dim=1) for tensor in (other, third))
            scores = torch.einsum("qhd,khd->hqk", one, other) * scale
            mixed.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), third))
        return torch.cat(mixed).to(query.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    torch.manual_seed(0)
    layout = packed.Packed(None, (30, 7, 1, 22), causal, CPU)
    query, key, value = (torch.randn(1, layout.starts[-1], heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    packed._grouped_heads.cache_clear()
    found = packed._fused(layout, query, key, value, 0.3, window if causal else None)
    packed._grouped_heads.cache_clear()
    expected = packed._one_by_one(layout, query, key, value, 0.3, window if causal else None)
    assert found.shape == expected.shape == (1, 60, 4, 8)
    assert torch.allclose(found, expected, atol=1e-5)


# On a GPU -----------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", [None, "bidirectional"])
@pytest.mark.parametrize("name", (*TEXT_FAMILIES, "qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
def test_kernel_of_families(family_folder, name, mode):
    """bfloat16 through the kernel is as near to float32 as padded bfloat16 is."""
    if not packable(name, mode):
        pytest.skip("stays padded")
    rows = random_rows((90, 40, 17, 16, 3, 1))
    model, preprocessor = built(family_folder(name), attention=mode)
    half, _ = built(family_folder(name), dtype="bfloat16", attention=mode)
    half.to("cuda")
    assert half.unpacked("auto", half.device, half.dtype) is None
    with torch.no_grad():
        exact = model(preprocessor.collate(rows)).vectors
        plain, found = (half(preprocessor.collate(rows, packed=on).to("cuda")).vectors.cpu() for on in (False, True))
    assert (found - exact).abs().max() < 2 * (plain - exact).abs().max() + 4e-3
    assert (found - plain).abs().max() < 2e-2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen3", {}),
        ("qwen3", {"attention": "bidirectional", "checkpointing": True}),
        ("qwen3", {"adapter": LORA, "attention": "bidirectional"}),
        ("mistral", {"checkpointing": True}),
        ("gemma3_text", {}),
        ("qwen3_vl", {}),
    ],
)
def test_gradients_of_the_kernel(family_folder, name, options, monkeypatch):
    """Under autocast, as training runs: gradients of the kernel against padded ones, both beside float32."""
    fused = watch(monkeypatch, packed, "_fused")
    folder = family_folder(name)
    _, exact = gradient(folder, **options)
    step = partial(gradient, folder, device="cuda", dtype=torch.bfloat16, **options)
    loss, plain = step()
    assert not fused
    for chunk_tokens, keep_tokens in [(ALL_AT_ONCE, None), (150, 0)]:
        found_loss, found = step(chunk_tokens, keep_tokens, packed=True)
        assert fused
        assert found_loss.item() == pytest.approx(loss.item(), rel=2e-2)
        assert relative(found, exact) < 2 * relative(plain, exact) + 1e-2


@pytest.mark.gpu
@needs_gpu
def test_encode_uses_the_kernel(monkeypatch):
    fused = watch(monkeypatch, packed, "_fused")
    model, preprocessor = build_from_settings(EmbedderSettings("mmembed-nano", dtype="bfloat16"))
    embedder = Embedder(model.to("cuda"), preprocessor)
    texts = [f"{index} red buses in Prague " * (1 + index % 5) for index in range(40)]
    plain = embedder.encode(texts, attention_kernel="padded")
    assert not fused
    assert abs(embedder.encode(texts, share_prefix="off") - plain).max() < 2e-2
    assert fused


def test_the_query_of_an_item_is_packed(family_folder):
    """Through the preprocessor too: pool mask and instruction as in padded rows."""
    model, preprocessor = built(family_folder("qwen3"), prompt="instruct")
    items = [Item((Text(text),), "query", INSTRUCTION) for text in ("a bus", "two red buses in the old town", "x")]
    rows = preprocessor.tokenize(items)
    with torch.no_grad():
        assert_same(model(preprocessor.collate(rows, packed=True)), model(preprocessor.collate(rows)))
