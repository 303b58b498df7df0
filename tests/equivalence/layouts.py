"""Models, rows and a contrastive step, for the tests of layouts of a chunk: packed, or behind a shared prefix."""

from functools import cache

import torch

from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Text
from mmembed.data.collate import Collator
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.objectives import build_objective
from mmembed.preprocess import Row
from mmembed.training.gradcache import contrastive_step
from tests.equivalence.toy import gradients

INSTRUCTION = "Given a question about a town, find the passage that answers it"
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", "init": "gaussian"}
FULL = {"type": "none"}
LATENT = {"type": "latent_attention", "num_latents": 8}
POOLINGS = ("mean", "weighted_mean", "last_token", "multi_vector", LATENT)
ALL_AT_ONCE = 10**6  # tokens a chunk


def built(folder, dtype="float32", **options):
    torch.manual_seed(0)
    model, preprocessor = build_from_settings(EmbedderSettings(str(folder), dtype=dtype, **options))
    return model.eval(), preprocessor


def cached(folder, pooling, attention=None):
    """`built`, once."""
    return _cached(folder, tuple(pooling.items()) if isinstance(pooling, dict) else pooling, attention)


@cache
def _cached(folder, pooling, attention):
    return built(folder, pooling=dict(pooling) if isinstance(pooling, tuple) else pooling, attention=attention)


def watch(monkeypatch, module, name):
    """A list that grows with each call of the module's function, which does its work."""
    calls, function = [], vars(module)[name]

    def watched(*given, **options):
        calls.append(name)
        return function(*given, **options)

    monkeypatch.setattr(module, name, watched)
    return calls


def random_rows(lengths, seed=0, head=()):
    """Rows of random tokens behind `head`; their first is kept out of pooling where another is left."""
    drawn = torch.Generator().manual_seed(seed)
    tokens = [[*head, *torch.randint(10, 300, (length,), generator=drawn).tolist()] for length in lengths]
    return [Row(ids, ((0, 1),) if len(ids) > 2 else ()) for ids in tokens]


def example(index):
    return Example(
        (Text(f"a question about {index} " + "and more words " * (index % 3)),),
        (Document((Text(f"an answer {index} " * (1 + index)),)), Document((Text("no " * (1 + 5 * index)),), 0.0)),
        instruction=INSTRUCTION,
        source="s",
        where=str(index),
    )


EXAMPLES = [example(index) for index in range(6)]


def gradient(
    folder,
    chunk_tokens=ALL_AT_ONCE,
    keep_tokens=None,
    packed=False,
    share=False,
    examples=EXAMPLES,
    checkpointing=False,
    device="cpu",
    dtype=None,
    **options,
):
    """(loss, gradients) of a contrastive step; `dtype` runs it under autocast."""
    model, preprocessor = built(folder, **{"adapter": FULL, **options})
    model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    source = SourceConfig(path="s", document_instruction=INSTRUCTION)
    collator = Collator(
        preprocessor, {"s": source}, chunk_tokens, train_group_size=2, share_prefix=share, packed=packed
    )
    batch = collator(examples)
    assert any(chunk.packed for chunk in batch.chunks) == packed or share
    assert any(chunk.shared and not chunk.packed for chunk in batch.chunks) == (batch.saved_tokens > 0) == share
    block = {"type": "contrastive", "temperature": {"value": 0.1, "learn": True}}
    if model.pooling.multi_vector:
        block["similarity"] = "maxsim"
    objective = build_objective(block).to(device)

    def encode(chunk):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return model(chunk.inputs(preprocessor).to(device))

    loss, _ = contrastive_step(encode, objective, batch, keep_tokens)
    return loss, gradients(model.cpu(), objective.cpu())
