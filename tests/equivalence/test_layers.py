"""Vectors of lower layers, from the pass that gives the last, are those of a backbone that ends there: in every layout
of tokens, with every adapter, and with the gradient of the undivided batch."""

import copy

import pytest
import torch
from families import FAMILIES, items

from mmembed.config.blocks import SourceConfig
from mmembed.content import to_content
from mmembed.data.collate import Collator
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.models.vision_cache import open_features
from mmembed.objectives import build_objective
from mmembed.preprocess import Item, Row
from mmembed.training.gradcache import Workers, contrastive_step
from tests.equivalence.test_real_model import EXAMPLES
from tests.equivalence.toy import gradients, relative

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "init": "gaussian"}
LATENT = {"type": "latent_attention", "num_latents": 8}
NESTED = {"type": "infonce", "temperature": 0.1, "matryoshka": {"layers": [1, -1], "dims": [64, 16]}}


def built(folder, **options):
    torch.manual_seed(0)
    model, preprocessor = build_from_settings(EmbedderSettings(str(folder), dtype="float32", **options))
    return model.eval(), preprocessor


def of_both(model, inputs):
    """Embeddings with the lower layer, and those of a copy without the upper layer."""
    short = copy.deepcopy(model)
    short.cut(1)
    model.give_layers([1])
    with torch.no_grad():
        return model(inputs), short(inputs)


def assert_same(found, expected):
    assert expected.layers is None and list(found.layers) == [1]
    torch.testing.assert_close(found.layers[1], expected.vectors, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.vectors, expected.vectors, atol=1e-2)
    assert (found.mask is None) == (expected.mask is None)
    assert found.mask is None or torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(family_folder, name):
    """Texts and pictures, padded on the left; what a model adds between its layers is in a layer's states."""
    model, preprocessor = built(family_folder(name), prompt="instruct")
    inputs = preprocessor(items(name), "left")
    with torch.no_grad():
        whole = model(inputs).vectors
    found, expected = of_both(model, inputs)
    assert_same(found, expected)
    assert torch.equal(found.vectors, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": LORA, "pooling": LATENT, "projection": 16},
        {"adapter": {"type": "prompt", "num_virtual_tokens": 4}},
        {"adapter": {"type": "prefix", "num_virtual_tokens": 4}},
        {"pooling": "multi_vector"},
        {"pooling": "last_token", "normalize": False},
        {"attention": "bidirectional"},
    ],
    ids=str,
)
def test_adapters_and_heads(family_folder, options):
    model, preprocessor = built(family_folder("qwen3"), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros: the adapter would do nothing
                parameter.normal_(std=0.1)
    assert_same(*of_both(model, preprocessor(items("qwen3"))))


@pytest.mark.parametrize("layout", [{"packed": True}, {"shared": 4}])
@pytest.mark.parametrize("hidden", [0, 4])
def test_layouts(family_folder, layout, hidden):
    """Texts one behind the other; rows behind a common beginning, which is pooled or not."""
    model, preprocessor = built(family_folder("qwen3"))
    rows = [Row([20, 21, 22, 23, *range(30, 30 + n)], ((0, hidden),) if hidden else ()) for n in (3, 9, 1)]
    inputs = preprocessor.collate(rows, **layout)
    found, expected = of_both(model, inputs)
    assert_same(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(found.layers[1], model(preprocessor.collate(rows)).layers[1], atol=1e-5, rtol=1e-4)


def test_stored_features_of_images_and_a_filler(family_folder, tmp_path):
    model, preprocessor = built(family_folder("qwen3_vl"))
    batch = items("qwen3_vl")
    _, expected = of_both(model, preprocessor(batch))
    preprocessor.features = open_features(model, preprocessor, tmp_path, 10**9, "")
    for _ in range(2):
        with torch.no_grad():
            assert_same(model(preprocessor(batch)), expected)
    preprocessor.features, preprocessor.touch_vision = None, True
    texts = [Item(to_content(text), "query") for text in ("a red bus", "a train")]
    inputs = preprocessor(texts)
    assert inputs.filler
    assert_same(*of_both(model, inputs))


def test_no_layer_no_trace(family_folder):
    """Nothing is hooked, and what was asked for before is forgotten."""
    model, preprocessor = built(family_folder("qwen3"))
    inputs = preprocessor(items("qwen3"))
    hooks = [part._forward_pre_hooks for part in model.modules()]
    model.give_layers([1])
    assert any(hooks) and model.settings.layers == (1,)
    model.give_layers([])
    assert not any(hooks) and model.settings.layers == () and model(inputs).layers is None


def test_upper_layers_are_not_computed(family_folder):
    model, preprocessor = built(family_folder("llama"))
    upper = model.backbone.layers[1]
    ran = []
    upper.register_forward_hook(lambda *given: ran.append(given))
    inputs = preprocessor(items("llama"))
    model(inputs)
    assert len(ran) == 1
    model.cut(1)
    model(inputs)
    assert len(ran) == 1 and model.depth == 1
    model.cut(1)
    with pytest.raises(ConfigError, match="layers: found 2; the backbone has 1, give 1 to 1"):
        model.cut(2)
    with pytest.raises(ConfigError, match="layers: found 0; the backbone has 1"):
        model.cut(0)


def test_layers_that_cannot_be(family_folder, monkeypatch):
    model, _ = built(family_folder("qwen3"))
    for wrong in ([2], [0], ["middle"], [1, 7]):
        with pytest.raises(ConfigError, match="the backbone has 2, give 1 to 1"):
            model.give_layers(wrong)
    monkeypatch.setattr("mmembed.backbones.layers.KNOWN", ("llama",))
    with pytest.raises(ConfigError, match="'qwen3' have not been compared"):
        model.give_layers([1])
    with pytest.raises(ConfigError, match="'qwen3' have not been compared"):
        model.cut(1)


# Gradients ------------------------------------------------------------------------------------------------------------


def batch_of(preprocessor, chunk_tokens, **layout):
    return Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens, train_group_size=2, **layout)(EXAMPLES)


def gradient(folder, block, chunk_tokens=10**6, keep_tokens=None, checkpointing=None, workers=0, packed=False, **more):
    model, preprocessor = built(folder, **more)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    objective = build_objective(block, model.embedding_size, model.depth)
    model.give_layers(objective.layers)
    batch = batch_of(preprocessor, chunk_tokens, packed=packed)
    threads = Workers(workers, [one for one in model.parameters() if one.requires_grad]) if workers else None
    loss, _ = contrastive_step(
        lambda chunk: model(chunk.inputs(preprocessor)), objective, batch, keep_tokens, workers=threads
    )
    return loss, gradients(model, objective)


def reference(folder, **more):
    """Two whole backbones with the same weights, one of which ends at layer 1: the gradient by parts, then summed."""
    model, preprocessor = built(folder, **more)
    model.train()
    short = copy.deepcopy(model)
    short.cut(1)
    batch = batch_of(preprocessor, 10**6)
    (chunk,) = batch.chunks
    vectors = [one(chunk.inputs(preprocessor)).rows(chunk.index.argsort()) for one in (model, short)]
    sides = [[one.rows(at) for one in vectors] for at in batch.place.split([batch.n_queries, batch.n_documents])]
    objective = build_objective({"type": "infonce", "temperature": 0.1, "matryoshka": {"dims": [64, 16]}})
    loss = sum(objective(*(side[place] for side in sides), batch.labels)[0] for place in (0, 1))
    last, lower = (torch.cat([side[place].vectors for side in sides]) for place in (0, 1))
    log_ratio = (last.detach() / 0.3).log_softmax(1) - (lower / 0.3).log_softmax(1)
    loss = loss + 0.3 * ((last.detach() / 0.3).softmax(1) * log_ratio).sum(1).mean()
    loss.backward()
    found = dict(short.named_parameters())
    for name, parameter in model.named_parameters():
        if name in found:
            parameter.grad = parameter.grad + found[name].grad
    return loss.detach(), gradients(model)


def test_the_gradient_is_that_of_two_backbones(family_folder):
    folder = family_folder("qwen3")
    loss, whole = reference(folder)
    found_loss, found = gradient(folder, NESTED)
    torch.testing.assert_close(found_loss, loss)
    assert relative(found, whole) < 1e-5


@pytest.mark.parametrize(
    "block",
    [NESTED, ["infonce", {"type": "infonce", "layer": 1, "weight": 0.5}, {"type": "uniformity", "layer": "middle"}]],
    ids=["nested", "list"],
)
def test_any_chunking(family_folder, block):
    folder = family_folder("qwen3")
    loss, whole = gradient(folder, block)
    for how in (
        {"keep_tokens": 0},
        {"keep_tokens": 120},
        {"keep_tokens": 60, "workers": 2},
        {"checkpointing": "plain"},
        {"checkpointing": "reentrant"},
        {"packed": True},
    ):
        found_loss, found = gradient(folder, block, 60, **how)
        torch.testing.assert_close(found_loss, loss)
        assert relative(found, whole) < 1e-5, how


def test_only_upper_layers_are_trained(family_folder):
    """The lower layer's vectors have no graph, those of the last have."""
    adapter = {**LORA, "target_modules": ["layers.1.self_attn.q_proj"]}
    for workers in (0, 2):
        _, found = gradient(family_folder("qwen3"), NESTED, 60, 60, workers=workers, adapter=adapter)
        assert found.abs().sum() > 0


def test_embeddings_carry_their_layers():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rows, length in ((2, 3), (1, 5)):
        vectors, lower = torch.randn(2, rows, length, 4, generator=generator)
        parts.append(Embeddings(vectors, torch.ones(rows, length).bool(), {2: lower}))
    joined = Embeddings.concatenate(parts).rows(torch.tensor([2, 0]))
    assert torch.equal(joined.at(2).vectors[0], parts[1].layers[2][0])
    assert torch.equal(joined.at(2).vectors[1, :3], parts[0].layers[2][0]) and not joined.at(2).vectors[1, 3:].any()
    assert torch.equal(joined.at(2).mask, joined.mask) and joined.at(None) is joined
