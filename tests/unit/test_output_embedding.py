"""What tokens cost to predict: against loops, against transformers' own language models, and what is refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, contents, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config

from mmembed.backbones import output_embedding, resolve_backbone
from mmembed.backbones.output_embedding import OutputEmbedding, load_output_embedding, token_losses
from mmembed.content import Text, to_content
from mmembed.data.collate import plan_chunks
from mmembed.errors import ConfigError, MmembedError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.preprocess import Item
from mmembed.training.memory import Meter

BOTH = ("query", "document")
INSTRUCTION = "Given a question about a town, find the passage"
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "init": "gaussian"}
PROMPTS = {"prompt": {"type": "prompt", "num_virtual_tokens": 3}, "prefix": {"type": "prefix", "num_virtual_tokens": 3}}


def built(folder, prompt="instruct", **options):
    """A model that predicts, and its preprocessor."""
    settings = EmbedderSettings(str(folder), dtype="float32", attention="causal", prompt=prompt, **options)
    torch.manual_seed(0)
    model, preprocessor = build_from_settings(settings)
    model.output_embedding = load_output_embedding(model.family, str(folder), None, model.dtype)
    return model.eval(), preprocessor


def by_loops(hidden, weight, targets):
    losses = []
    for state, target in zip(hidden, targets.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(state, row, strict=True)) for row in weight]
        losses.append(torch.stack(logits).exp().sum().log() - logits[target])
    return torch.stack(losses)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 9), vocabulary=st.integers(2, 7), cells=st.integers(1, 40), seed=st.integers(0, 9))
@pytest.mark.parametrize("trained", ["states", "weight", "both"])
def test_losses_and_gradients_are_those_of_loops(trained, tokens, vocabulary, cells, seed):
    """In slices of any size; each token has a weight of its own in what the loss is used for."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).requires_grad_(trained != "weight")
    weight = torch.randn(vocabulary, 3, generator=generator, dtype=torch.float64).requires_grad_(trained != "states")
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    used = torch.rand(tokens, generator=generator, dtype=torch.float64)
    leaves = [one for one in (hidden, weight) if one.requires_grad]
    expected = by_loops(hidden, weight, targets)
    of_expected = torch.autograd.grad(expected @ used, leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_embedding, "CELLS", cells)
        found = token_losses(hidden, weight, targets)
        of_found = torch.autograd.grad(found @ used, leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_found, of_expected)


def test_in_half_precision_logits_are_summed_in_32_bits():
    hidden, weight = torch.randn(6, 16).bfloat16(), torch.randn(500, 16).bfloat16()
    targets = torch.arange(6)
    exact = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(token_losses(hidden, weight, targets), exact, **close)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = token_losses(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(under_autocast, exact, **close)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_logits_never_stand_whole(monkeypatch, trained):
    """What a forward keeps and holds is what a plan counts; the logits of all tokens would be 10 times that."""
    monkeypatch.setattr(output_embedding, "CELLS", 4000)
    hidden = torch.randn(400, 8, requires_grad=True)
    weight, targets = torch.randn(1000, 8, requires_grad=trained), torch.randint(0, 1000, (400,))
    with Meter() as meter:
        for _ in range(2):  # the meter knows the weight in the second one
            losses = None
            before = meter.peak = meter.now
            losses = token_losses(hidden[torch.arange(400)], weight, targets)
            kept, peak = meter.now - before, meter.peak - before
    planned, height = OutputEmbedding(None).memory(400, weight, 4)
    assert losses.requires_grad
    assert planned <= kept < planned + 10_000  # losses, and places of the states
    assert height <= peak < planned + height + 2 * 400 * 8 * 4 + 10_000  # states of a slice, and of all
    assert peak < 400 * 1000 * 4 / 10


def own_loss(folder, model, inputs):
    """The mean loss that transformers' language model of a folder computes of the predicted tokens."""
    cls = AutoModelForImageTextToText if model.family.multimodal else AutoModelForCausalLM
    path = resolve_backbone(str(folder))
    full = cls.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    full.config.get_text_config().is_causal = True
    labels = inputs.tensors["input_ids"].masked_fill(~inputs.predicted, -100)
    return full(**inputs.tensors, labels=labels).loss.item()


@pytest.mark.parametrize("name", [*FAMILIES, "mmembed-nano"])
def test_it_is_the_loss_of_the_whole_language_model(family_folder, name):
    """Texts, and texts behind images; the padding on either side. nano does not tie its output embedding."""
    folder = name if name == "mmembed-nano" else family_folder(name)
    model, preprocessor = built(folder)
    given = contents("qwen3_vl" if name == "mmembed-nano" else name)
    items = [Item(to_content(one), BOTH[at % 2], INSTRUCTION if at % 2 == 0 else None) for at, one in enumerate(given)]
    rows = preprocessor.tokenize(items, BOTH)
    for pictured in (False, True):
        some = [row for row in rows if bool(row.images) == pictured]
        if not some:
            continue
        inputs = preprocessor.collate(some)
        with torch.no_grad():
            found = model(inputs)
            left = model(preprocessor.collate(some, "left"))
        assert found.nll.sum() / found.predicted.sum() == pytest.approx(own_loss(folder, model, inputs), rel=1e-4)
        assert found.predicted.sum() > 0
        torch.testing.assert_close(left.nll, found.nll)
        assert torch.equal(left.predicted, found.predicted)


def predicted_text(preprocessor, row):
    return [preprocessor.tokenizer.decode(row.ids[first:stop]) for first, stop in row.predicted]


@pytest.mark.parametrize("prompt", ["plain", "instruct", "chat", "one_word", "hierarchical"])
def test_texts_are_predicted_and_nothing_else(family_folder, prompt):
    """Neither instruction, template, images nor end; cut texts up to the cut."""
    _, preprocessor = built(family_folder("qwen3_vl"), prompt, pooling="last_token")
    text = "Photosynthesis turns sunlight into sugar"
    (row,) = preprocessor.tokenize([Item((Text(text),), "query", INSTRUCTION)], BOTH)
    assert "".join(predicted_text(preprocessor, row)).strip() == text
    assert len(row) > sum(stop - first for first, stop in row.predicted)
    (pictured,) = preprocessor.tokenize([Item(to_content(contents("qwen3_vl")[4]), "document")], BOTH)
    assert "".join(predicted_text(preprocessor, pictured)).strip() == "what is it"
    long = [Item((Text(text * 200),), "document", INSTRUCTION)]
    (cut,) = preprocessor.tokenize(long, BOTH)
    assert len(cut) == 512 and (text * 200).startswith("".join(predicted_text(preprocessor, cut)).strip())


def test_only_the_asked_roles_are_predicted_and_no_first_token(family_folder):
    _, preprocessor = built(family_folder("qwen3"), "plain")
    items = [Item((Text("the cat sat on the mat"),), role) for role in BOTH]
    query, document = preprocessor.tokenize(items, ["document"])
    assert query.predicted == () and document.predicted == ((0, len(document)),)
    inputs = preprocessor.collate([query, document])
    assert not inputs.predicted[0].any() and inputs.predicted[1].tolist() == [False] + [True] * (len(document) - 1)
    assert preprocessor.collate(preprocessor.tokenize(items)).predicted is None


@pytest.mark.parametrize("pooling", ["mean", "last_token", "multi_vector"])
def test_shared_prefixes_and_packed_rows_cost_the_same(family_folder, pooling):
    """Texts that begin alike behind an instruction: what is predicted lies in the shared prefix, too."""
    model, preprocessor = built(family_folder("qwen3"), pooling=pooling)
    texts = [f"The cat sat on the mat while the {animal} slept" for animal in ("dog", "bus and the train", "cat")]
    rows = preprocessor.tokenize([Item((Text(text),), "query", INSTRUCTION) for text in texts], BOTH)
    (chunk,) = plan_chunks(rows, 10**6, shareable=[preprocessor.shareable(row) for row in rows])
    first = chunk.rows[0].predicted[0][0]
    assert chunk.shared > first + 5
    with torch.no_grad():
        plain, shared = model(preprocessor.collate(chunk.rows)), model(chunk.inputs(preprocessor))
        packed = model(preprocessor.collate(chunk.rows, packed=True))
    for other in (shared, packed):
        torch.testing.assert_close(other.nll, plain.nll)
        torch.testing.assert_close(other.vectors, plain.vectors)
        assert torch.equal(other.predicted, plain.predicted)


@pytest.mark.parametrize("kind", ["lora", *PROMPTS])
def test_adapters(family_folder, kind):
    """LoRA begins as the bare model; virtual tokens stand in front of everything and are no targets."""
    adapter = LORA if kind == "lora" else PROMPTS[kind]
    model, preprocessor = built(family_folder("qwen3"), adapter=adapter)
    bare, _ = built(family_folder("qwen3"))
    rows = preprocessor.tokenize([Item((Text(f"The cat sat on the {word}"),)) for word in ("mat", "red bus")], BOTH)
    found, plain = model.train()(preprocessor.collate(rows)), bare(preprocessor.collate(rows))
    assert torch.equal(found.predicted, plain.predicted)
    assert torch.allclose(found.nll, plain.nll, atol=1e-4) == (kind == "lora")
    found.nll.sum().backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained and all(one.grad is not None and torch.isfinite(one.grad).all() for one in trained)
    assert any(one.grad.any() for one in trained)


def test_the_output_embedding_is_neither_trained_nor_saved():
    model, _ = built("mmembed-nano")
    assert model.output_embedding.weight.shape == (7680, 256)
    assert not any("output_embedding" in name for name in [*model.state_dict(), *dict(model.named_parameters())])


def test_a_model_that_was_not_told_refuses(family_folder):
    model, preprocessor = built(family_folder("qwen3"))
    inputs = preprocessor.collate(preprocessor.tokenize([Item((Text("The cat"),))], BOTH))
    model.output_embedding = None
    with pytest.raises(MmembedError, match="given no output_embedding"):
        model(inputs)


def test_bidirectional_attention_is_refused(family_folder):
    settings = EmbedderSettings(str(family_folder("qwen3")), attention="bidirectional")
    model, _ = build_from_settings(settings)
    with pytest.raises(ConfigError, match="has seen those it is to predict; set model.attention: causal"):
        load_output_embedding(model.family, settings.name_or_path, None, model.dtype)


def test_a_backbone_without_its_output_embedding_is_refused(tmp_path):
    """An embedder that was trained whole: saved without what it has no use for."""
    model, _ = build_from_settings(EmbedderSettings("mmembed-nano", dtype="float32"))
    model.backbone.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"'{tmp_path}' does not tie.*0 tensors called 'lm_head.weight'"):
        load_output_embedding(model.family, str(tmp_path), None, model.dtype)


def test_an_unknown_decoder_is_refused(tmp_path):
    tokenizer = make_tokenizer("qwen")
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = build_from_settings(EmbedderSettings(str(tmp_path)))
    with pytest.raises(ConfigError, match="the decoder 'gpt2' makes logits.*use one of qwen2, qwen3"):
        load_output_embedding(model.family, str(tmp_path), None, model.dtype)


def test_a_weight_of_several_files_is_found(tmp_path):
    """As large models lie on the hub: an index, and files of a few tensors each."""
    whole = AutoModelForImageTextToText.from_pretrained(resolve_backbone("mmembed-nano"), dtype=torch.float32)
    whole.save_pretrained(tmp_path, max_shard_size="4MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, _ = build_from_settings(EmbedderSettings("mmembed-nano", dtype="float32"))
    found = load_output_embedding(model.family, str(tmp_path), None, torch.float32)
    assert torch.equal(found.weight, whole.lm_head.weight)
