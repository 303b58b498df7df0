"""Embedder: what goes in comes out in its place, whatever the batches, options and kernels."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmembed.inference.embedder as module
from mmembed import Embedder
from mmembed.backbones import load_backbone, patch_conv
from mmembed.errors import MmembedError
from mmembed.inference.cpu import OneDnnLinear, OneDnnPatches, accelerate, attend, attend_aligned
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.quantize import decode, quantize

INSTRUCTION = "Find the picture"


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def build(folder: Path, **settings: object) -> Embedder:
    return Embedder(*build_from_settings(EmbedderSettings(str(folder), dtype="float32", **settings)))


@pytest.fixture(scope="module")
def embedder(family_folder) -> Embedder:
    return build(family_folder("qwen3_vl"))


@pytest.fixture(scope="module")
def contents() -> list:
    return [
        "a red bus",
        {"image": picture(0)},
        "a much longer text about nothing in particular " * 6,
        {"image": picture(1, (120, 64)), "text": "what is this?"},
        picture(2),
        "b",
        {"images": [picture(3), picture(4)], "text": "which of the two?"},
        ["text first", {"image": picture(5)}],
        {"video": [picture(6), picture(7)]},
    ]


@pytest.fixture(scope="module")
def alone(embedder, contents) -> np.ndarray:
    return np.concatenate([embedder.encode([content]) for content in contents])


@pytest.mark.parametrize("token_budget", [1, 64, None])
def test_order_is_restored_for_any_batches(embedder, contents, alone, token_budget):
    together = embedder.encode(contents, token_budget=token_budget)
    np.testing.assert_allclose(together, alone, atol=2e-6)
    order = np.random.default_rng(0).permutation(len(contents))
    shuffled = embedder.encode([contents[index] for index in order], token_budget=token_budget)
    np.testing.assert_allclose(shuffled, alone[order], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_batches_beside_each_other(embedder, contents, alone, monkeypatch):
    """With several threads a narrow model computes several batches at once: same vectors, same threads after."""
    before, threads_seen = torch.get_num_threads(), set()
    compute = Embedder._compute

    def watched(self, *given):
        threads_seen.add((threading.get_ident(), torch.get_num_threads()))
        return compute(self, *given)

    monkeypatch.setattr(Embedder, "_compute", watched)
    torch.set_num_threads(3)
    try:
        together = embedder.encode(contents * 4, token_budget=64)
        with pytest.raises(MmembedError, match=r"contents\[13\]"):
            embedder.encode([*contents, *"abcd", {"image": "/nowhere.png"}], token_budget=1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(threads_seen) > 1 and {threads for _, threads in threads_seen} == {1}
    np.testing.assert_allclose(together, np.concatenate([alone] * 4), atol=2e-6)


@pytest.mark.parametrize(
    ("amx", "dtype", "pictured", "tokens"),
    [
        (True, "bfloat16", False, 4096),
        (True, "bfloat16", True, 2048),
        (True, "float32", False, 2048),
        (False, "bfloat16", False, 2048),
    ],
)
def test_matrix_units_want_larger_batches_of_texts(family_folder, monkeypatch, amx, dtype, pictured, tokens):
    embedder = Embedder(*build_from_settings(EmbedderSettings(str(family_folder("qwen3_vl")), dtype=dtype)))
    monkeypatch.setattr(module, "cpu_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 1)
    seen = []
    plan = module.plan_chunks
    monkeypatch.setattr(
        module, "plan_chunks", lambda rows, budget, **rest: seen.append(budget) or plan(rows, budget, **rest)
    )
    embedder.encode(["a", "b", *([{"image": picture(0)}] if pictured else [])])
    embedder.encode(["a"], token_budget=77)
    assert seen == [tokens, 77]


@pytest.mark.parametrize(
    ("passive", "amx", "images", "tokens", "apart"),
    [
        (False, True, False, 4096, False),
        (False, True, False, 2000, True),
        (False, True, True, 4096, True),
        (False, False, False, 4096, True),
        (True, True, False, 4096, True),
    ],
)
def test_threads_share_full_batches_of_texts_on_matrix_units(
    family_folder, monkeypatch, passive, amx, images, tokens, apart
):
    embedder = Embedder(*build_from_settings(EmbedderSettings(str(family_folder("qwen3")), dtype="bfloat16")))
    monkeypatch.setattr(module, "cpu_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(module, "PASSIVE", passive)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 2)
    assert embedder._apart(images, tokens) == apart
    monkeypatch.setattr(module, "NARROW", 8)
    assert not embedder._apart(images, tokens)


@pytest.mark.parametrize("passive", [False, True])
def test_sharing_threads_changes_no_vector(embedder, contents, alone, monkeypatch, passive):
    monkeypatch.setattr(type(embedder), "_units", True)
    monkeypatch.setattr(module, "AMX_TOKENS", 40)
    monkeypatch.setattr(module, "PASSIVE", passive)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        np.testing.assert_allclose(embedder.encode(contents), alone, atol=2e-6)
    finally:
        torch.set_num_threads(before)


def test_windows_join(embedder, contents, alone, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 2)
    np.testing.assert_allclose(embedder.encode(contents), alone, atol=2e-6)


def test_different_contents_differ(alone):
    similarities = alone @ alone.T - 2 * np.eye(len(alone))
    assert similarities.max() < 0.9999


def test_torch_output(embedder, contents, alone):
    vectors = embedder.encode(contents[:3], output="torch")
    assert isinstance(vectors, torch.Tensor) and vectors.device.type == "cpu"
    np.testing.assert_allclose(vectors.numpy(), alone[:3], atol=2e-6)


@pytest.mark.parametrize(("precision", "dtype", "width"), [("float32", np.float32, 40), ("binary", np.uint8, 5)])
def test_no_contents(embedder, precision, dtype, width):
    vectors = embedder.encode([], truncate_dim=40, precision=precision)
    assert vectors.shape == (0, width) and vectors.dtype == dtype


def test_truncation_is_normalised_again(embedder, contents, alone):
    vectors = embedder.encode(contents, truncate_dim=16)
    expected = alone[:, :16] / np.sqrt((alone[:, :16] ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_truncation_keeps_lengths_of_a_model_that_does_not_normalise(family_folder):
    raw = build(family_folder("qwen3_vl"), normalize=False)
    np.testing.assert_array_equal(raw.encode(["a bus"], truncate_dim=8), raw.encode(["a bus"])[:, :8])


def test_precisions_against_plain_loops(embedder, contents):
    vectors = embedder.encode(contents)
    np.testing.assert_array_equal(embedder.encode(contents, precision="float16"), vectors.astype(np.float16))
    narrow = embedder.encode(contents, precision="bfloat16", output="torch")
    assert torch.equal(narrow, torch.from_numpy(vectors).bfloat16())
    np.testing.assert_array_equal(decode(embedder.encode(contents, precision="bfloat16")), narrow.float().numpy())
    int8 = embedder.encode(contents, precision="int8")
    binary = embedder.encode(contents, precision="binary")
    for row, (vector, whole, bits) in enumerate(zip(vectors, int8, binary, strict=True)):
        peak = max(abs(value) for value in vector)
        assert whole.dtype == np.int8 and list(whole) == [int(np.rint(127 * value / peak)) for value in vector], row
        packed = [sum(2 ** (7 - bit) for bit in range(8) if vector[8 * byte + bit] > 0) for byte in range(len(bits))]
        assert bits.dtype == np.uint8 and list(bits) == packed, row


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=40).filter(lambda v: sum(x * x for x in v) > 1e-3))
def test_quantised_rows_keep_their_direction(values):
    vector = np.array([values], dtype=np.float32)
    unit = vector / np.linalg.norm(vector)
    whole = decode(quantize(vector, "int8"))
    assert (whole * unit).sum() > 0.999
    signs = decode(quantize(vector, "binary"), dim=len(values))
    np.testing.assert_array_equal(signs[0] > 0, vector[0] > 0)
    assert abs(np.linalg.norm(signs) - 1) < 1e-5


def test_roles_and_instructions(family_folder):
    embedder = build(family_folder("qwen3_vl"), prompt="instruct")
    texts = ["a bus", "a train"]
    bare = embedder.encode(texts)
    np.testing.assert_allclose(embedder.encode(texts, role="query"), bare, atol=1e-6)
    asked = embedder.encode(texts, role="query", instruction=INSTRUCTION)
    assert np.abs(asked - bare).max() > 1e-3
    own = [{"text": text, "instruction": INSTRUCTION} for text in texts]
    np.testing.assert_allclose(embedder.encode(own, role="query", instruction="ignored"), asked, atol=1e-6)
    one_each = embedder.encode(texts, role="query", instruction=[None, INSTRUCTION])
    np.testing.assert_allclose(one_each, np.stack([bare[0], asked[1]]), atol=1e-6)
    with pytest.raises(MmembedError, match="1 instructions for 2 contents"):
        embedder.encode(texts, instruction=["only one"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "an empty text"),
        (" \n", "an empty text"),
        ({"image": picture(0), "text": " "}, "an empty text"),
        (3, "cannot read a int"),
        ({"text": "x", "imgae": "y.png"}, "did you mean 'image'"),
        ({"image": "there-is-none.png"}, "no such file"),
        ([], "an empty list"),
        ("bad \ud800 x", r"not valid Unicode \(a lone surrogate, \\ud800\)"),
        ({"text": "x", "instruction": "\udfff"}, r"not valid Unicode \(a lone surrogate, \\udfff\)"),
    ],
)
def test_a_bad_content_is_named_by_its_index(embedder, bad, message):
    with pytest.raises(MmembedError, match=rf"contents\[2\]: .*{message}"):
        embedder.encode(["a", {"image": picture(0)}, bad, "d"])


def test_a_picture_damaged_behind_its_header_is_named(embedder, tmp_path):
    whole = tmp_path / "whole.png"
    picture(0, (200, 200)).save(whole)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(whole.read_bytes()[:20000])
    with pytest.raises(MmembedError, match=r"contents\[1\]: .*damaged.png"):
        embedder.encode([{"image": str(whole)}, {"image": str(damaged)}, {"image": str(whole)}])
    with pytest.raises(MmembedError, match="damaged.png"):
        embedder.check({"image": str(damaged)})
    embedder.check({"image": str(whole)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "qurey"}, "did you mean 'query'"),
        ({"output": "nunpy"}, "did you mean 'numpy'"),
        ({"precision": "int9"}, "did you mean 'int8'"),
        ({"truncate_dim": 65}, "65 dimensions of vectors that have 64"),
        ({"truncate_dim": 0}, "truncate_dim: 0"),
        ({"token_budget": 0}, "token_budget: 0"),
    ],
)
def test_bad_options(embedder, options, message):
    with pytest.raises(MmembedError, match=message):
        embedder.encode(["a"], **options)


def test_a_device_that_is_not_there_is_named(family_folder):
    with pytest.raises(MmembedError, match="cuda:99.*known: cpu"):
        Embedder.from_pretrained(family_folder("qwen3"), device="cuda:99")


def test_a_bare_string_is_refused(embedder):
    with pytest.raises(MmembedError, match=r"encode\(\[content\]\)"):
        embedder.encode("not a list")


@pytest.mark.parametrize("contents", [(text for text in "ab"), {"a", "b"}, None, 3], ids=lambda one: type(one).__name__)
def test_what_has_no_order_or_length_is_refused(embedder, contents):
    with pytest.raises(MmembedError, match=r"contents: a \w+, read by no index; give a list"):
        embedder.encode(contents)


def test_an_array_of_texts_is_taken(embedder):
    assert len(embedder.encode(np.array(["a", "b"]))) == 2


def test_similarity_of_different_dimensions_is_refused(embedder, alone):
    with pytest.raises(MmembedError, match="similarity: vectors of 32 and 64 dimensions; .*truncate_dim"):
        embedder.similarity(alone, alone[:, :32])


def test_similarity_is_the_cosine_in_every_precision(embedder, contents, alone):
    exact = alone @ alone.T
    np.testing.assert_allclose(embedder.similarity(alone, torch.from_numpy(alone)), exact, atol=1e-5)
    for precision, tolerance in (("float16", 2e-3), ("int8", 1e-2)):
        stored = embedder.encode(contents, precision=precision)
        np.testing.assert_allclose(embedder.similarity(stored, stored), exact, atol=tolerance)
    signs = embedder.encode(contents, truncate_dim=20) > 0
    bits = embedder.encode(contents, truncate_dim=20, precision="binary")
    equal = (signs[:, None] == signs[None]).sum(axis=-1)
    np.testing.assert_allclose(embedder.similarity(bits, bits, truncate_dim=20), (2 * equal - 20) / 20, atol=1e-6)
    with pytest.raises(MmembedError, match="give the truncate_dim"):
        embedder.similarity(bits, bits)


def test_multi_vector_models(family_folder):
    embedder = build(family_folder("qwen3_vl"), pooling="multi_vector")
    texts = ["a red bus", "one two three four five six"]
    vectors = embedder.encode(texts)
    assert {one.shape[1] for one in vectors} == {embedder.embedding_size} and len(vectors[0]) < len(vectors[1])
    expected = np.array([[sum(max(float(x @ y) for y in b) for x in a) for b in vectors] for a in vectors])
    np.testing.assert_allclose(embedder.similarity(vectors, vectors), expected, rtol=1e-4)
    halved = embedder.encode(texts, truncate_dim=32, output="torch")
    with pytest.raises(MmembedError, match=f"similarity: vectors of 32 and {embedder.embedding_size} dimensions"):
        embedder.similarity(vectors, halved)
    assert [tuple(one.shape) for one in halved] == [(len(vectors[0]), 32), (len(vectors[1]), 32)]


def test_saved_and_loaded_gives_the_same_vectors(embedder, contents, alone, tmp_path):
    embedder.save(tmp_path / "saved")
    loaded = Embedder.from_pretrained(tmp_path / "saved", dtype="float32", device="cpu")
    assert loaded.embedding_size == embedder.embedding_size == alone.shape[1]
    np.testing.assert_allclose(loaded.encode(contents), alone, atol=2e-6)
    assert "mmembed_cpu" not in (tmp_path / "saved" / "config.json").read_text()  # another machine has other kernels


# Kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 64, 150])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend", [attend, attend_aligned])
def test_kernels_of_bfloat16_attention_are_attention(attend, length, causal):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, 6, 16, generator=generator).transpose(1, 2).bfloat16()  # (B, H, T, D)
    key, value = (torch.randn(2, 3, length, 16, generator=generator).bfloat16() for _ in range(2))
    holder = torch.nn.Module()
    holder.is_causal, holder.num_key_value_groups = causal, 2
    with torch.inference_mode():
        ours, _ = attend(holder, query, key, value, None)  # (B, T, H, D)
    scores = query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2) / 4
    if causal:
        scores.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ value.double().repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(ours.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "length, keys, blocks",
    [(63, 63, [63]), (64, 64, [64]), (65, 80, [65]), (95, 96, [95]), (96, 96, [64, 96]), (150, 160, [64, 128, 150])],
)
def test_keys_are_aligned_where_it_helps(monkeypatch, length, keys, blocks):
    """And only those of causal bfloat16 inference: the gradient's stay as they are, float32's are taken in blocks."""
    seen = []

    def kernel(query, key, value, **options):
        seen.append(key.shape[2])
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    holder = torch.nn.Module()
    holder.is_causal, holder.num_key_value_groups = True, 2
    query, key = torch.randn(2, 4, length, 8).bfloat16(), torch.randn(2, 2, length, 8).bfloat16()
    with torch.inference_mode():
        attend_aligned(holder, query, key, key, None)
        attend_aligned(holder, query, key, key, None, is_causal=False)
        attend_aligned(holder, query.float(), key.float(), key.float(), None)
    attend_aligned(holder, query, key, key, None)
    assert seen == [keys, length, *blocks, length]


def test_onednn_products_and_gradients_are_those_of_linear():
    torch.manual_seed(0)
    stock = torch.nn.Linear(24, 10)
    ours = OneDnnLinear(24, 10)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 5, 24)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), stock(x))
        torch.testing.assert_close(ours(x[:0]), stock(x[:0]))
        torch.testing.assert_close(ours(x.bfloat16().float()), stock(x.bfloat16().float()))
    for layer in (stock, ours):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)


def test_patches_as_products_are_the_convolution():
    torch.manual_seed(0)
    stock = torch.nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    ours = OneDnnPatches(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    ours.load_state_dict(stock.state_dict())
    patches, larger = torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 4, 8, 4)
    with torch.inference_mode():
        torch.testing.assert_close(ours(patches), stock(patches))
        torch.testing.assert_close(ours(larger), stock(larger))
        torch.testing.assert_close(ours.bfloat16()(patches.bfloat16()), stock.bfloat16()(patches.bfloat16()))


def test_where_a_convolution_over_patches_is_slow_they_are_multiplied(family_folder, monkeypatch):
    """With gradients, too; the modules of a loaded backbone are of that kind."""
    monkeypatch.setattr(patch_conv, "DEVICES", {"cpu"})
    torch.manual_seed(0)
    stock = torch.nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    ours = patch_conv.PatchConv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    ours.load_state_dict(stock.state_dict())
    patches, larger = torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 4, 8, 4)
    torch.testing.assert_close(ours(larger), stock(larger))
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", None)
    found = ours(patches)
    monkeypatch.undo()
    torch.testing.assert_close(found, stock(patches))
    for output in (found, stock(patches)):
        output.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
    torch.testing.assert_close(ours.bias.grad, stock.bias.grad)
    model = load_backbone(str(family_folder("qwen2_vl"))).model
    assert [type(one) for one in model.modules() if isinstance(one, torch.nn.Conv3d)] == [patch_conv.PatchConv3d]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_accelerated_models_give_the_stock_vectors(family_folder, family, attention):
    settings = EmbedderSettings(str(family_folder(family)), attention=attention, dtype="bfloat16")
    model, preprocessor = build_from_settings(settings)
    items = [module.Item((module.Text(text),)) for text in ("a red bus", "two words", "many more words " * 30)]
    batches = [preprocessor(items), preprocessor(items[:1])]  # with padding, and without
    with torch.inference_mode():
        stock = [model.eval()(batch).vectors for batch in batches]
        accelerate(model.backbone)
        ours = [model(batch).vectors for batch in batches]
    for one, other in zip(stock, ours, strict=True):
        assert torch.nn.functional.cosine_similarity(one, other).min() > 0.999
