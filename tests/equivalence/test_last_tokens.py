"""The last layer of the last tokens alone gives the vectors and gradients of the whole layer, in every layout.

The judge is a copy of the model, whose last layer is transformers' own.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmembed.backbones.last_tokens import KNOWN, LastLayer
from mmembed.backbones.layers import decoder_of
from mmembed.content import Image, to_content
from mmembed.data.collate import plan_chunks
from mmembed.inference.cpu import accelerate
from mmembed.inference.decoder import fuse_layers
from mmembed.inference.elementwise import Quick, accelerate_elementwise
from mmembed.preprocess import Item, Row
from tests.equivalence.layouts import INSTRUCTION, LORA, built
from tests.equivalence.toy import gradients, relative

# mistral's layers have a window; llava_onevision has a decoder of qwen2, smolvlm and idefics3 one of llama
FOLLOWING = ("qwen2", "qwen3", "llama", "qwen3_vl", "llava_onevision", "smolvlm", "idefics3")


def last_layer(model):
    return decoder_of(model.base).layers[-1]


def watch(model):
    """A list of the tokens that go through the last layer's feed-forward."""
    tokens = []
    last_layer(model).mlp.register_forward_pre_hook(lambda module, given: tokens.append(given[0].shape[:2].numel()))
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_families(family_folder, name):
    """Text, and image behind the instruction; alone, behind a shared prefix and behind one that is known; with the
    stock kernels and those of inference."""
    model, preprocessor = built(family_folder(name), prompt="instruct", pooling="last_token")
    whole, follows = copy.deepcopy(model), name in FOLLOWING
    assert isinstance(last_layer(model), LastLayer) == follows and not isinstance(last_layer(whole), LastLayer)
    tokens = watch(model)
    items = [Item(to_content(content), "query", INSTRUCTION) for content in contents(name)]
    for has_images in (False, True):
        part = [item for item in items if any(isinstance(piece, Image) for piece in item.content) == has_images]
        if not part:
            continue
        rows = preprocessor.tokenize(part)
        (chunk,) = plan_chunks(rows, 10**6, shareable=[preprocessor.shareable(row) for row in rows])
        for quick in (False, True):
            if quick:
                accelerate(model.backbone)
            for side in ("right", "left"):
                with torch.inference_mode():
                    expected = whole(preprocessor.collate(chunk.rows, side)).vectors
                    assert torch.allclose(model(preprocessor.collate(chunk.rows, side)).vectors, expected, atol=1e-5)
            inputs = chunk.inputs(preprocessor)
            with torch.inference_mode():
                assert torch.allclose(model(inputs).vectors, expected, atol=1e-5)
                if inputs.shared:
                    known = model.read_prefix(inputs.tensors["input_ids"][0, : inputs.shared])
                    tokens.clear()
                    assert torch.allclose(model(replace(inputs, prefix=known)).vectors, expected, atol=1e-5)
                    assert (sum(tokens) == len(chunk.rows)) == follows


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    prefix=st.integers(0, 30),
    known=st.booleans(),
    checkpointing=st.booleans(),
    lora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_of_any_rows(family_folder, lengths, prefix, known, checkpointing, lora, seed):
    """Of every weight that is trained; texts of any lengths, with and without a shared beginning."""
    model, preprocessor = built(
        family_folder("qwen3"), pooling="last_token", adapter=LORA if lora else {"type": "none"}
    )
    whole = copy.deepcopy(model)
    drawn = torch.Generator().manual_seed(seed)
    head = torch.randint(10, 300, (prefix,), generator=drawn).tolist()
    rows = [Row(head + torch.randint(10, 300, (length,), generator=drawn).tolist()) for length in lengths]
    weights = torch.randn(len(rows), model.embedding_size, generator=drawn)
    for one in (model, whole):
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable()
        inputs = preprocessor.collate(rows, shared=prefix if one is model and len(rows) > 1 else 0)
        (one(inputs).vectors * weights).sum().backward()
    assert relative(gradients(model), gradients(whole)) < 1e-5


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 products in oneDNN"
)
def test_fused_layers():
    """The layers for matrix units, which are put before the class of ours, in bfloat16."""
    model, preprocessor = built("mmembed-nano", dtype="bfloat16", pooling="last_token")
    whole = copy.deepcopy(model)
    accelerate_elementwise(model.backbone, fused=True)
    fuse_layers(model.backbone)
    assert isinstance(last_layer(model), Quick) and isinstance(last_layer(model), LastLayer)
    tokens = watch(model)
    rows = preprocessor.tokenize([Item(to_content("red buses " * count)) for count in (3, 40, 7)])
    with torch.inference_mode():
        found, expected = (one(preprocessor.collate(rows)).vectors for one in (model, whole))
    assert tokens == [3] and torch.allclose(found, expected, atol=1e-2)


def test_known_decoders_are_those_tested():
    assert {*KNOWN} == {"qwen2", "qwen3", "llama", "mistral", "qwen3_vl_text"}


def test_what_reads_more_than_the_last_tokens_gets_whole_layers(family_folder):
    """Vectors of lower layers, and other poolings; a cut backbone ends in another layer, which follows then."""
    folder = family_folder("qwen3")
    model, preprocessor = built(folder, pooling="last_token")
    inputs = preprocessor.collate([Row(list(range(10, 10 + length))) for length in (9, 4)])
    tokens = watch(model)
    with torch.no_grad():
        alone = model(inputs)
        assert tokens == [2]
        model.give_layers([1])
        both = model(inputs)
    assert tokens == [2, 18] and torch.allclose(both.vectors, alone.vectors, atol=1e-5)
    model.cut(1)
    assert isinstance(last_layer(model), LastLayer)
    with torch.no_grad():
        assert torch.allclose(model(inputs).vectors, both.layers[1], atol=1e-5)
    assert not isinstance(last_layer(built(folder, pooling="mean")[0]), LastLayer)
    assert not isinstance(last_layer(built(folder, pooling="last_token", attention="bidirectional")[0]), LastLayer)


def test_pickles_are_of_the_stock(family_folder):
    model, _ = built(family_folder("qwen3"), pooling="last_token")
    layer = last_layer(model)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again).__name__ == type(layer).__name__ and not isinstance(again, LastLayer)
    assert type(again) in type(layer).__mro__
