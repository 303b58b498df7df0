"""Gradients of a real (tiny) backbone: equal for both padding sides, any chunking, gradient checkpointing or not."""

import pytest
import torch

from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Text
from mmembed.data.collate import Collator
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives import build_objective
from mmembed.training.gradcache import Workers, contrastive_step
from tests.equivalence.toy import gradients, relative

EXAMPLES = [
    Example(
        (Text(f"a question about {index} " + "and more words " * (index % 3)),),
        (Document((Text(f"an answer {index} " * (1 + index)),)), Document((Text(f"no answer {index}"),), 0.0)),
        source="s",
        where=str(index),
    )
    for index in range(5)
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradient(folder, attention, side, chunk_tokens, keep_tokens, checkpointing=False, workers=0, autocast=False):
    settings = EmbedderSettings(str(folder), attention=attention, dtype="float32")
    model, preprocessor = build_from_settings(settings)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    objective = build_objective({"type": "contrastive", "temperature": {"value": 0.1, "learn": True}})
    batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens, train_group_size=2)(EXAMPLES)

    def encode(chunk):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # in the forward, as the trainer has it
            return model(preprocessor.collate(chunk.rows, padding_side=side))

    threads = Workers(workers, [one for one in model.parameters() if one.requires_grad]) if workers else None
    contrastive_step(encode, objective, batch, keep_tokens, workers=threads)
    return gradients(model, objective)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_side_chunking_and_checkpointing(family_folder, attention):
    folder = family_folder("qwen3")
    whole = gradient(folder, attention, "right", 10**6, None)
    assert whole.norm() > 0
    assert torch.isfinite(whole).all()
    for side, chunk_tokens, keep_tokens in [("left", 10**6, None), ("right", 60, 0), ("left", 100, 120)]:
        assert relative(gradient(folder, attention, side, chunk_tokens, keep_tokens), whole) < 1e-5
    assert relative(gradient(folder, attention, "right", 60, 0, checkpointing=True), whole) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_chunks_beside_each_other(family_folder, two_threads, family):
    """The gradient of chunks in turn; and the same bits every time, whichever thread was faster."""
    folder = family_folder(family)
    whole = gradient(folder, "causal", "right", 10**6, None)
    for keep_tokens in (0, 60, None):
        beside = [gradient(folder, "causal", "right", 40, keep_tokens, workers=2) for _ in range(3)]
        assert relative(beside[0], whole) < 1e-5
        assert torch.equal(beside[0], beside[1]) and torch.equal(beside[0], beside[2])
    assert torch.get_num_threads() == 2


def test_autocast_casts_are_not_shared_between_threads(family_folder, two_threads):
    """A weight cast in a pass without gradients would cut the graph of a chunk computed at the same time."""
    folder = family_folder("qwen3")
    in_turn = gradient(folder, "causal", "right", 40, 60, autocast=True)
    for _ in range(5):
        beside = gradient(folder, "causal", "right", 40, 60, workers=2, autocast=True)
        assert relative(beside, in_turn) < 1e-2
