"""Gradients of a real (tiny) backbone: equal for both padding sides, any chunking, gradient checkpointing or not."""

import pytest
import torch

from mmembed.config import SourceConfig
from mmembed.content import Document, Example, Text
from mmembed.data.collate import Collator
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step
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


def gradient(folder, attention, side, chunk_tokens, keep_tokens, checkpointing=False):
    settings = EmbedderSettings(str(folder), attention=attention, dtype="float32")
    model, preprocessor = build_from_settings(settings)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    objective = build_objective({"type": "contrastive", "temperature": {"value": 0.1, "learn": True}})
    batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens, train_group_size=2)(EXAMPLES)

    def encode(chunk):
        return model(preprocessor.collate(chunk.rows, padding_side=side))

    contrastive_step(encode, objective, batch, keep_tokens)
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
