"""A prefix computed once a chunk gives the vectors and gradients of a prefix computed in every row."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXT_FAMILIES, contents, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmembed import Embedder
from mmembed.backbones import attention, shared_prefix
from mmembed.content import Document, Example, Image, Text, to_content
from mmembed.data.collate import plan_chunks
from mmembed.errors import MmembedError
from mmembed.inference.cpu import _blocked_attention, accelerate
from mmembed.inference.embedder import KEPT_PREFIXES
from mmembed.models.embedding_model import EmbedderSettings, EmbeddingModel, build_from_settings
from mmembed.preprocess import Item, Row
from tests.equivalence.layouts import (
    ALL_AT_ONCE,
    EXAMPLES,
    FULL,
    INSTRUCTION,
    LATENT,
    LORA,
    POOLINGS,
    built,
    cached,
    gradient,
    watch,
)
from tests.equivalence.toy import gradients, relative


def both_ways(model, preprocessor, rows):
    """(vectors sharing, vectors not sharing, tokens shared) of rows that go through the model together."""
    (chunk,) = plan_chunks(rows, 10**6, shareable=[preprocessor.shareable(row) for row in rows])
    plain = model(preprocessor.collate(chunk.rows))
    return model(chunk.inputs(preprocessor)), plain, chunk.shared


@pytest.mark.parametrize("name", FAMILIES)
def test_families(family_folder, name):
    """Text, and image behind the instruction. Where attention forbids it nothing is shared, and why is said."""
    model, preprocessor = built(family_folder(name), prompt="instruct")
    items = [Item(to_content(content), "query", INSTRUCTION) for content in contents(name)]
    for has_images in (False, True):
        part = [item for item in items if any(isinstance(piece, Image) for piece in item.content) == has_images]
        if not part:
            continue
        with torch.no_grad():
            shared, plain, count = both_ways(model, preprocessor, preprocessor.tokenize(part))
        assert torch.allclose(shared.vectors, plain.vectors, atol=1e-5)
        expected = name != "paligemma" and not (name == "gemma3" and has_images)
        assert (model.unshared(has_images) is None) == expected
        assert count > 20 if expected else count == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(TEXT_FAMILIES),
    pooling=st.sampled_from(POOLINGS),
    prefix=st.integers(4, 60),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    hidden=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_any_prefix(family_folder, name, pooling, prefix, lengths, hidden, seed):
    """Random tokens; all, a part or nothing of the prefix is kept out of pooling; windows shorter than the prefix."""
    model, preprocessor = cached(family_folder(name), pooling)
    torch.manual_seed(seed)
    head = torch.randint(10, 300, (prefix,)).tolist()
    out = ((0, min(hidden, prefix)),) if hidden else ()
    rows = [Row(head + torch.randint(10, 300, (length,)).tolist(), out) for length in lengths]
    with torch.no_grad():
        plain = model(preprocessor.collate(rows))
        shared = model(preprocessor.collate(rows, shared=prefix))
    if plain.mask is None:
        assert torch.allclose(shared.vectors, plain.vectors, atol=1e-5)
    else:  # masked columns of the prefix need not come back
        assert torch.equal(shared.mask.sum(1), plain.mask.sum(1))
        assert torch.allclose(shared.vectors[shared.mask], plain.vectors[plain.mask], atol=1e-5)


PICTURED = [
    Example((Image(picture(index)),), (Document((Text(f"picture {index}"),)),), instruction=INSTRUCTION, source="s")
    for index in range(4)
]


FEW_SHOT = "".join(
    f"Instruct: {INSTRUCTION}\nQuery: where is town {index}?\nAnswer: by the river {index}\n\n" for index in range(3)
)


@pytest.mark.parametrize(
    "name, options",
    [
        ("qwen3", {}),
        ("qwen3", {"adapter": LORA}),
        ("qwen3", {"adapter": LORA, "pooling": LATENT}),
        ("qwen3", {"adapter": LORA, "pooling": "last_token"}),
        ("qwen3", {"adapter": LORA, "pooling": "multi_vector"}),
        ("qwen3", {"pooling": "weighted_mean", "checkpointing": True}),
        ("gemma3_text", {}),
        ("mistral", {"checkpointing": True}),
        ("qwen3_vl", {"freeze": (), "examples": PICTURED}),
        ("qwen2_vl", {"adapter": LORA, "examples": PICTURED, "checkpointing": True}),
        ("qwen3_vl", {"adapter": LORA, "prompt": "hierarchical"}),
        ("qwen3", {"adapter": LORA, "prompt": {"type": "plain", "query_prefix": FEW_SHOT}}),
        ("smolvlm", {"freeze": (), "examples": PICTURED}),
    ],
)
def test_gradients(family_folder, name, options):
    """Kept, recomputed, or in small chunks: equal losses and gradients to rows computed one by one."""
    step = partial(gradient, family_folder(name), **{"prompt": "instruct", **options})
    loss, expected = step()
    assert expected.norm() > 0
    for chunk_tokens, keep_tokens in [(ALL_AT_ONCE, None), (150, 0), (150, 200)]:
        found_loss, found = step(chunk_tokens, keep_tokens, share=True)
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert relative(found, expected) < 1e-5


def test_gradients_under_a_prompt_that_is_pooled(family_folder):
    """The prefix takes part in the mean of every row, so every row sends it a gradient twice."""
    options = {"prompt": {"type": "instruct", "mask_instruction": False}, "adapter": FULL}

    def step(share):
        model, preprocessor = built(family_folder("qwen3"), **options)
        items = [Item(example.query, "query", INSTRUCTION) for example in EXAMPLES]
        rows = preprocessor.tokenize(items)
        shareable = [preprocessor.shareable(row) for row in rows] if share else None
        (chunk,) = plan_chunks(rows, 10**6, shareable=shareable)
        weights = torch.linspace(-1, 1, len(rows)).unsqueeze(1)
        (model(chunk.inputs(preprocessor)).vectors * weights).sum().backward()
        return gradients(model)

    assert relative(step(True), step(False)) < 1e-5


def test_a_filler_has_the_prefix_too(family_folder):
    model, preprocessor = built(family_folder("qwen3_vl"), prompt="instruct", freeze=())
    rows = preprocessor.tokenize([Item(to_content(text), "query", INSTRUCTION) for text in ("a bus", "two red buses")])
    shared, plain, count = both_ways(model, preprocessor, rows)
    preprocessor.touch_vision = True
    touched, _, _ = both_ways(model, preprocessor, rows)
    assert count > 20
    assert torch.allclose(touched.vectors, plain.vectors, atol=1e-5)
    assert touched.vectors.shape == shared.vectors.shape


def before(model, rows, shared, preprocessor):
    """Vectors of rows whose first tokens went through the model alone, with its kernels for inference."""
    inputs = preprocessor.collate(rows, shared=shared)
    return model(replace(inputs, prefix=model.read_prefix(inputs.tensors["input_ids"][0, :shared])))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_computed_before(family_folder, name):
    """Text, and image behind the instruction, with the stock kernels and with those of inference."""
    model, preprocessor = built(family_folder(name), prompt="instruct")
    items = [Item(to_content(content), "query", INSTRUCTION) for content in contents(name)]
    for has_images in (False, True):
        part = [item for item in items if any(isinstance(piece, Image) for piece in item.content) == has_images]
        if not part or model.unshared(has_images) is not None:
            continue
        (chunk,) = plan_chunks(
            (rows := preprocessor.tokenize(part)), 10**6, shareable=[preprocessor.shareable(row) for row in rows]
        )
        assert chunk.shared > 20
        with torch.inference_mode():
            plain = model(preprocessor.collate(chunk.rows)).vectors
            assert torch.allclose(before(model, chunk.rows, chunk.shared, preprocessor).vectors, plain, atol=1e-5)
            accelerate(model.backbone)
            assert torch.allclose(before(model, chunk.rows, chunk.shared, preprocessor).vectors, plain, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("hidden", [0, 10, 30])
def test_a_pooled_prefix_computed_before(family_folder, pooling, hidden):
    """All, a part or nothing of it is pooled, in layers below the last as well; a window of 16 is shorter."""
    model, preprocessor = built(family_folder("mistral"), pooling=pooling)
    model.give_layers([1])
    out = ((0, hidden),) if hidden else ()
    rows = [Row([*range(10, 40), *range(50, 50 + length)], out) for length in (3, 17, 120)]
    with torch.inference_mode():
        plain, known = model(preprocessor.collate(rows)), before(model, rows, 30, preprocessor)
    for ours, expected in ((known.vectors, plain.vectors), (known.layers[1], plain.layers[1])):
        if plain.mask is not None:  # masked columns of the prefix need not come back
            ours, expected = ours[known.mask], expected[plain.mask]
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_encode_computes_a_prefix_once_for_all_batches(family_folder, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    embedder = Embedder(*built(family_folder("qwen3"), prompt="instruct"))
    texts, how = [f"{index % 7} red" * (1 + index % 5) for index in range(40)], {"role": "query"}
    whole = embedder.encode(texts, instruction=INSTRUCTION, share_prefix="off", **how)
    seen = []
    embedder.model.base.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    found = embedder.encode(texts, instruction=INSTRUCTION, token_budget=120, **how)
    assert np.allclose(found, whole, atol=1e-5)
    rows = embedder.preprocessor.tokenize([Item((Text(text),), "query", INSTRUCTION) for text in texts])
    limits = [embedder.preprocessor.shareable(row) for row in rows]
    chunks = plan_chunks(rows, 120, shareable=limits)
    uses = Counter(tuple(chunk.rows[0].ids[: chunk.shared]) for chunk in chunks)
    assert max(uses.values()) > 2
    alone = [len(prefix) for prefix, count in uses.items() if count > 1 and prefix]
    behind = [
        chunk.padded_tokens - chunk.shared * (uses[tuple(chunk.rows[0].ids[: chunk.shared])] > 1) for chunk in chunks
    ]
    assert sorted(seen) == sorted(alone + behind)
    seen.clear()
    embedder.encode(texts, instruction=INSTRUCTION, token_budget=10**6, **how)
    together = [chunk.padded_tokens for chunk in plan_chunks(rows, 10**6, shareable=limits)]
    assert sorted(seen) == sorted(together), "a prefix of one batch goes with it"


def test_encode_keeps_few_prefixes(family_folder, monkeypatch):
    monkeypatch.setattr("mmembed.inference.embedder.KEPT_PREFIXES", 1)
    embedder = Embedder(*built(family_folder("qwen3"), prompt="instruct"))
    texts = [f"{index} red" * (1 + index % 5) for index in range(40)]
    instructions = [INSTRUCTION if index % 2 else "Find what is said of the colour of these" for index in range(40)]
    options = {"role": "query", "instruction": instructions, "token_budget": 120}
    whole = embedder.encode(texts, share_prefix="off", **options)
    assert np.allclose(embedder.encode(texts, **options), whole, atol=1e-5)


def test_more_prefixes_than_are_kept_are_computed_once_each(family_folder, monkeypatch):
    """Their batches come one behind another: a query's documents, of as many queries as there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    embedder = Embedder(*built(family_folder("qwen3"), prompt="instruct"))
    calls, count = watch(monkeypatch, EmbeddingModel, "read_prefix"), 3 * KEPT_PREFIXES
    texts = [f"{index % 7} red" * (1 + 3 * (index // count)) for index in range(8 * count)]
    options = {"role": "query", "instruction": [f"{index % count} {INSTRUCTION}" for index in range(len(texts))]}
    whole = embedder.encode(texts, share_prefix="off", **options)
    assert np.allclose(embedder.encode(texts, token_budget=120, **options), whole, atol=1e-5)
    assert len(calls) == count


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_encode(precision, tolerance):
    embedder = Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", prompt="instruct", dtype=precision)))
    texts = [f"{index} red buses in Prague " * (1 + index % 5) for index in range(40)]
    pictures = [{"image": picture(seed)} for seed in range(4)]
    for given_contents in (texts, texts + pictures):
        shared, plain = (
            embedder.encode(given_contents, role="query", instruction=INSTRUCTION, share_prefix=how)
            for how in ("auto", "off")
        )
        assert abs(shared - plain).max() < tolerance
    with pytest.raises(MmembedError, match="share_prefix"):
        embedder.encode(texts, share_prefix="on")


def test_blocks_of_queries_behind_other_keys():
    """The kernel of bfloat16 inference, in float32 against a plain softmax: queries at the end of the keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 150, 8), torch.randn(2, 2, 190, 8), torch.randn(2, 2, 190, 8)
    mask = torch.ones(150, 190, dtype=torch.bool).tril(40)
    expected = shared_prefix.masked_attention(query, key, value, mask, 0.0, 0.3)
    assert torch.allclose(_blocked_attention(query, key, value, 0.3, True), expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"attention": "bidirectional"}, "bidirectional"),
        ({"attn_implementation": "eager"}, "'eager'"),
        ({"adapter": {"type": "prefix", "num_virtual_tokens": 4}}, "'prefix'"),
        ({"adapter": {"type": "prompt", "num_virtual_tokens": 4}}, "'prompt'"),
    ],
)
def test_where_it_cannot_be(family_folder, options, reason):
    """The reason is said, and inputs planned with a prefix are computed row by row all the same."""
    model, preprocessor = built(family_folder("qwen3"), prompt="instruct", **options)
    assert reason in model.unshared()
    rows = preprocessor.tokenize([Item((Text(text),), "query", INSTRUCTION) for text in ("a bus", "two red buses")])
    with torch.no_grad():
        plain, planned = (model(preprocessor.collate(rows, shared=count)).vectors for count in (0, 20))
    assert torch.equal(plain, planned)


def test_a_backbone_that_ignores_the_prefix_is_noticed(family_folder, monkeypatch):
    """As code brought by a model may: its attention takes the argument and does not look at it."""
    model, preprocessor = built(family_folder("qwen3"), prompt="instruct")
    rows = preprocessor.tokenize([Item((Text(text),), "query", INSTRUCTION) for text in ("a bus", "two red buses")])
    monkeypatch.setattr(attention, "follows", lambda module, layout: False)
    with pytest.raises(MmembedError, match=r"0 of 2 layers .* share_prefix: off"):
        model(preprocessor.collate(rows, shared=20))


def test_pictures_that_look_alike_as_tokens_are_not_shared(family_folder):
    model, preprocessor = built(family_folder("qwen3_vl"))
    rows = preprocessor.tokenize([Item((Image(picture(seed)), Text("what is it"))) for seed in range(3)])
    assert len({tuple(row.ids) for row in rows}) == 1
    assert {preprocessor.shareable(row) for row in rows} == {rows[0].ids.index(model.family.config.image_token_id)}


def test_a_merged_token_at_the_border_ends_the_prefix(family_folder):
    """`Find it: 1` and `Find it: 2` may be cut elsewhere than behind the instruction: what is equal is shared."""
    model, preprocessor = built(family_folder("qwen3"), prompt={"type": "plain", "query_prefix": INSTRUCTION})
    rows = preprocessor.tokenize([Item((Text(text),), "query") for text in ("s", "ing of it", " it", "")])
    with torch.no_grad():
        shared, plain, count = both_ways(model, preprocessor, rows)
    assert 0 < count < min(map(len, rows))
    assert torch.allclose(shared.vectors, plain.vectors, atol=1e-5)
