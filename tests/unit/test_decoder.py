"""Decoder layers whose sums, projections and heads share passes over memory: the numbers of the stock, or the stock."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import mmembed.backbones  # noqa: F401  declares the operators that torchvision misses
from mmembed.inference import decoder, elementwise
from mmembed.inference.decoder import fuse_layers
from mmembed.inference.elementwise import accelerate_elementwise

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "use_cache": False,
    "attn_implementation": "sdpa",
}
MODELS = {
    "qwen3": lambda **more: tf.Qwen3Model(tf.Qwen3Config(**SIZES, **more)),  # norms of heads
    "qwen2": lambda **more: tf.Qwen2Model(tf.Qwen2Config(**{**SIZES, "head_dim": 8}, **more)),  # biases
    "llama": lambda **more: tf.LlamaModel(tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **more)),
    "qwen3_vl": lambda **more: tf.Qwen3VLTextModel(
        tf.Qwen3VLTextConfig(**SIZES, rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2]}, **more)
    ),
}
pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 products in oneDNN"
)


def random_model(name, **more):
    torch.manual_seed(0)
    model = MODELS[name](**more).eval()
    for one in model.parameters():
        nn.init.normal_(one, 0.0 if one.dim() > 1 else 1.0, 0.15)
    return model


def fused(model):
    accelerate_elementwise(model, fused=True)
    fuse_layers(model)
    return model


def count(model):
    return sum(isinstance(one, decoder._QuickLayer) for one in model.layers)


@pytest.mark.parametrize("shape", [(1, 3), (3, 20)], ids=["fewer tokens than columns", "more"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_as_near_to_float32_as_the_stock(monkeypatch, name, shape):
    exact = random_model(name)
    ids = torch.randint(64, shape)
    stock, ours = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    assert count(fused(ours)) == 2
    for block in ("HEAD_ROWS", "LAYER_ROWS"):
        monkeypatch.setattr(decoder, block, 7)
    monkeypatch.setattr(elementwise, "FUSED_ROWS", 4)
    runs = []
    monkeypatch.setattr(
        decoder, "_decode", lambda *given, run=decoder._decode, **more: runs.append(1) or run(*given, **more)
    )
    with torch.no_grad():
        expected, rough, found = (one(ids).last_hidden_state.float() for one in (exact, stock, ours))
    assert len(runs) == 2
    assert (found - expected).norm() < 1.05 * (rough - expected).norm()


def test_the_input_of_a_layer_stays_as_it_was():
    model = fused(random_model("qwen3").bfloat16())
    given = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: given.append((inputs[0], inputs[0].clone())))
    with torch.no_grad():
        model(torch.randint(64, (2, 9)))
    assert len(given) == 2 and all(torch.equal(one, before) for one, before in given)


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features = inner, SIZES["intermediate_size"]

    def forward(self, hidden):
        return self.inner(hidden) / 2


@pytest.mark.parametrize("change", ["hook", "adapter", "method", "norm", "float32", "gradient", "cache", "training"])
def test_what_a_layer_has_or_gets_beyond_the_formula_is_the_stocks(monkeypatch, change):
    model = fused(random_model("qwen3").bfloat16())
    ids, more, layer, called = torch.randint(64, (2, 9)), {}, model.layers[1], []
    decode = decoder._decode
    monkeypatch.setattr(
        decoder, "_decode", lambda one, *given, **named: called.append(one) or decode(one, *given, **named)
    )
    if change == "hook":
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, inputs: None)
    elif change == "adapter":
        layer.mlp.down_proj = Halved(layer.mlp.down_proj)
    elif change == "method":
        layer.self_attn.forward = layer.self_attn.forward
    elif change == "norm":
        layer.self_attn.q_norm = Halved(layer.self_attn.q_norm)
    elif change == "float32":
        model.float()
    elif change == "cache":
        more = {"past_key_values": tf.DynamicCache(config=model.config), "use_cache": True}
    elif change == "training":
        layer.train()
    with torch.set_grad_enabled(change == "gradient"):
        model(ids, **more)
    everywhere = change in ("float32", "gradient", "cache")
    assert called == ([] if everywhere else [model.layers[0]])


def test_other_layers_are_left_alone():
    class Scaled(type(random_model("qwen3").layers[0])):
        def forward(self, hidden_states, **named):
            return hidden_states + (super().forward(hidden_states, **named) - hidden_states) / 2

    model = random_model("qwen3").bfloat16()
    model.layers[0].__class__ = Scaled
    assert count(fused(model)) == 1
    windows = tf.MistralModel(tf.MistralConfig(**SIZES, sliding_window=4)).bfloat16()
    relu = random_model("qwen3", hidden_act="relu").bfloat16()
    exact = random_model("qwen3")
    assert [count(fused(one)) for one in (windows, relu, exact)] == [0, 0, 0]


def test_copies_and_pickles_are_of_the_stock_class():
    model = fused(random_model("qwen3").bfloat16())
    stock = type(random_model("qwen3").layers[0])
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one.layers[0]) is stock
