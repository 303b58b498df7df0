"""A language-model loss beside a contrastive one: the gradient of the undivided batch, however it is divided.

Against plain autograd: no chunks, no slices, no text encoded once for two places. Two processes: test_gradcache.py.
"""

import pytest
import torch
from families import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.backbones import output_embedding
from mmembed.backbones.output_embedding import load_output_embedding
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Image, Text
from mmembed.data.collate import Collator
from mmembed.embeddings import Embeddings
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives import build_objective
from mmembed.preprocess import Item
from mmembed.training.gradcache import Workers, contrastive_step
from mmembed.training.out_of_memory import Budget
from tests.equivalence.test_gradcache import direct
from tests.equivalence.test_out_of_memory import asks_for_too_much, redone
from tests.equivalence.toy import Captioner, gradients, make_batch, relative

BLOCK = [{"type": "infonce", "temperature": 0.1}, {"type": "captioning", "sides": "both", "weight": 0.5}]
INSTRUCTION = "Given a question about a town, find the passage"
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "init": "gaussian"}


@settings(max_examples=25, deadline=None)
@given(
    chunk_tokens=st.integers(1, 300),
    keep_tokens=st.one_of(st.none(), st.integers(0, 300)),
    seed=st.integers(0, 5),
    multi_vector=st.booleans(),
    workers=st.integers(1, 3),
    rounds=st.one_of(st.none(), st.integers(0, 20)),
)
def test_any_chunking_equals_the_direct_step(chunk_tokens, keep_tokens, seed, multi_vector, workers, rounds):
    encoder, objective = Captioner(multi_vector=multi_vector), build_objective(BLOCK)
    loss, expected = direct(encoder, objective, make_batch(6, 3, 10**6, seed=seed))
    chunked, chunked_objective = Captioner(multi_vector=multi_vector), build_objective(BLOCK)
    beside = Workers(workers, list(chunked.parameters())) if workers > 1 and rounds is None else None
    batch = make_batch(6, 3, chunk_tokens, seed=seed)
    found, metrics = contrastive_step(chunked, chunked_objective, batch, keep_tokens, workers=beside, rounds=rounds)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["loss_infonce"] + 0.5 * metrics["loss_captioning"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative(gradients(chunked, chunked_objective), expected) < 1e-5


def test_the_language_model_loss_has_a_part_in_that():
    """Otherwise the test above could not fail."""
    found = []
    for block in (BLOCK, BLOCK[:1]):
        encoder = Captioner()
        contrastive_step(encoder, build_objective(block), make_batch(6, 3, 10**6), None)
        found.append(gradients(encoder))
    assert relative(found[1], found[0]) > 0.1


@pytest.mark.parametrize("keep_tokens", [0, 20])
def test_dropout_repeats_in_the_second_pass(keep_tokens):
    results = []
    for keep in (None, keep_tokens):
        encoder = Captioner(dropout=0.5)
        torch.manual_seed(7)
        contrastive_step(encoder, build_objective(BLOCK), make_batch(6, 3, 25), keep)
        results.append(gradients(encoder))
    assert relative(results[1], results[0]) < 1e-5


class Small(Captioner):
    """What is above 40 padded tokens is really refused by the allocator."""

    def forward(self, chunk):
        if chunk.padded_tokens > 40:
            asks_for_too_much()
        return super().forward(chunk)


def test_out_of_memory_changes_no_gradient():
    """Over two accumulated batches."""
    batches = [make_batch(6, 3, 10**6, seed=seed) for seed in (3, 4)]
    encoder, small = Captioner(), Small()
    expected = [contrastive_step(encoder, build_objective(BLOCK), one, None, scale=0.5)[0] for one in batches]
    found, halving = redone(small, build_objective(BLOCK), batches, Budget(10**6, None, None))
    assert halving.budget.chunk_tokens <= 40
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)
    assert relative(gradients(small), gradients(encoder)) < 1e-5


def examples(pictured):
    """Two queries share a positive, two queries are one text, some documents begin alike."""
    found = []
    for index in range(5):
        answer = f"The town on the river has a bridge {'and a tower ' * index}{index}"
        content = (Image(f"{index % 2}.png"), Text(answer)) if pictured and index % 2 else (Text(answer),)
        positive = Document((Text("It lies in the north"),)) if index in (0, 3) else Document(content)
        negative = Document((Text(f"The town on the hill {index}"),), 0.0)
        query = Text("which town" if index in (1, 4) else f"which town is number {index} " + "of them " * index)
        found.append(Example((query,), (positive, negative), INSTRUCTION, source="s", where=str(index)))
    return found


def build(folder, adapter, prompt="instruct"):
    settings = EmbedderSettings(str(folder), dtype="float32", attention="causal", adapter=adapter, prompt=prompt)
    torch.manual_seed(0)
    model, preprocessor = build_from_settings(settings)
    model.output_embedding = load_output_embedding(model.family, str(folder), None, model.dtype)
    return model.train(), preprocessor


def reference(folder, adapter, some):
    """Loss and gradient by plain autograd: one forward a text, as often as it stands in the batch, whole logits."""
    model, preprocessor = build(folder, adapter)
    queries = [Item(one.query, "query", one.instruction) for one in some]
    documents = [Item(document.content, "document") for one in some for document in one.documents]
    vectors, losses = [], []
    output = model.output_embedding
    weight = model.base.get_input_embeddings().weight if output.weight is None else output.weight
    states = []
    original = model.pooling.forward
    model.pooling.forward = lambda hidden, mask: (states.append(hidden), original(hidden, mask))[1]
    for item in [*queries, *documents]:
        (row,) = preprocessor.tokenize([item], [item.role])
        inputs = preprocessor.collate([row])
        inputs.predicted = None
        vectors.append(model(inputs).vectors)
        logits = states[-1][0] @ weight.T  # (T, V)
        for first, stop in row.predicted:
            for place in range(max(first, 1), stop):
                losses.append(-torch.log_softmax(logits[place - 1], 0)[row.ids[place]])
    batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, 10**6, train_group_size=2)(some)
    split = torch.cat(vectors).split([len(queries), len(documents)])
    contrast, _ = build_objective(BLOCK[0])(*map(Embeddings, split), batch.labels)
    loss = contrast + 0.5 * torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradients(model), len(losses)


WAYS = {
    "whole": {},
    "padding on the left": {"side": "left", "chunk_tokens": 90},
    "recomputed chunks": {"chunk_tokens": 60, "keep_tokens": 0},
    "some chunks kept": {"chunk_tokens": 60, "keep_tokens": 120},
    "small slices": {"cells": 1500, "chunk_tokens": 100},
    "gradient checkpointing": {"chunk_tokens": 100, "checkpointing": True},
    "threads": {"chunk_tokens": 60, "keep_tokens": 60, "workers": 2},
    "shared prefixes": {"share_prefix": True},
    "shared prefixes, recomputed": {"share_prefix": True, "keep_tokens": 0, "chunk_tokens": 120},
    "packed": {"packed": True, "chunk_tokens": 120},
}


@pytest.mark.parametrize(
    ("family", "adapter", "ways"),
    [
        ("qwen3", {"type": "none"}, list(WAYS)),
        ("qwen3", LORA, ["recomputed chunks", "threads", "shared prefixes", "packed"]),
        ("qwen3_vl", {"type": "none"}, ["recomputed chunks", "shared prefixes"]),
        ("mmembed-nano", LORA, ["recomputed chunks", "shared prefixes"]),
    ],
    ids=["full", "lora", "pictures", "untied"],
)
def test_a_real_backbone(family_folder, tmp_path, monkeypatch, family, adapter, ways):
    monkeypatch.chdir(tmp_path)
    folder = family if family == "mmembed-nano" else family_folder(family)
    for number in range(2):
        picture(number).save(f"{number}.png")
    some = examples(pictured=family != "qwen3")
    loss, expected, tokens = reference(folder, adapter, some)
    assert expected.norm() > 0 and tokens > 60
    for name in ways:
        found, gradient, batch = in_one_way(folder, adapter, some, **WAYS[name])
        assert found == pytest.approx(loss, rel=1e-5), name
        assert relative(gradient, expected) < 1e-5, name
        assert sum(len(chunk.rows) for chunk in batch.chunks) < 15, "a text that stands twice is encoded once"
        assert bool(batch.saved_tokens) == ("shared" in name), name


def in_one_way(
    folder,
    adapter,
    some,
    side="right",
    chunk_tokens=10**6,
    keep_tokens=None,
    cells=None,
    checkpointing=False,
    workers=0,
    share_prefix=False,
    packed=False,
):
    model, preprocessor = build(folder, adapter)
    if checkpointing:
        model.gradient_checkpointing_enable()
    objective = build_objective(BLOCK)
    roles = {"s": objective.part_for("s", some[0].task).predicts}
    options = {"train_group_size": 2, "share_prefix": share_prefix, "packed": packed, "predicted": roles}
    batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens, **options)(some)
    if side == "left":
        assert not share_prefix

    def encode(chunk):
        return model(preprocessor.collate(chunk.rows, side, chunk.shared, chunk.packed))

    threads = Workers(workers, [one for one in model.parameters() if one.requires_grad]) if workers else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_embedding, "CELLS", cells or output_embedding.CELLS)
        loss, _ = contrastive_step(encode, objective, batch, keep_tokens, workers=threads)
    return loss.item(), gradients(model), batch
