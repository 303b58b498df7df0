"""Where a loss looks at a query's own documents alone, each part of a batch is encoded once: the gradient of the whole.

The judge is plain autograd over the undivided batch.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.data.collate import Chunk
from mmembed.objectives import build_objective
from mmembed.training.gradcache import Workers, contrastive_step, whole_parts
from tests.equivalence.test_gradcache import direct
from tests.equivalence.toy import ToyEncoder, gradients, make_batch, relative

TOLERANCE = 1e-5
LEARNED = {"type": "ranking", "temperature": {"value": 0.5, "learn": True}}
SEPARABLE = [
    "sft",
    {**LEARNED, "loss": "infonce", "score": "yes"},
    {**LEARNED, "loss": {"type": "sft", "balanced": True}},
    {"type": "ranking", "loss": "lambdarank"},
    {"type": "weight_direction", "weight": "contrastive"},
    ["sft", {**LEARNED, "loss": "listnet", "weight": 0.5}],
]
COUPLED = [{"type": "ranking", "loss": "wasserstein"}, ["sft", {"type": "ranking", "loss": "wasserstein"}], "infonce"]


def by_query(batch, seed, split):
    """The batch in chunks of one or two queries with their documents; with `split` some queries stand in two chunks."""
    generator = random.Random(seed)
    (whole,) = batch.chunks
    rows = dict(zip(whole.index.tolist(), whole.rows, strict=True))
    groups = [[query] for query in range(batch.n_queries)]
    for document, owner in enumerate(batch.labels.owner.tolist()):
        groups[owner].append(batch.n_queries + document)
    joined: list[list[int]] = []
    for group in groups:
        if joined and generator.random() < 0.3:
            joined[-1] += group
        else:
            joined.append(group)
    parts = []
    for group in joined:
        cut = generator.randrange(1, len(group)) if split and generator.random() < 0.5 else len(group)
        parts += [part for part in (group[:cut], group[cut:]) if part]
    generator.shuffle(parts)
    return replace(batch, chunks=tuple(Chunk(torch.tensor(part), tuple(rows[one] for one in part)) for part in parts))


class Counting(ToyEncoder):
    """Counts how often each input is encoded."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = Counter()

    def forward(self, chunk):
        self.seen.update(chunk.index.tolist())
        return super().forward(chunk)


@settings(max_examples=60, deadline=None)
@given(
    block=st.sampled_from(SEPARABLE + COUPLED),
    keep_tokens=st.one_of(st.none(), st.integers(0, 300)),
    split=st.booleans(),
    seed=st.integers(0, 20),
    workers=st.integers(1, 3),
    ragged=st.booleans(),
)
def test_parts_give_the_gradient_of_the_whole(block, keep_tokens, split, seed, workers, ragged):
    objective, other = build_objective(block, depth=2), build_objective(block, depth=2)
    encoder, chunked = Counting(), Counting()
    whole = make_batch(6, 4, 10**6, seed=seed, in_batch=False, ragged=ragged)
    loss, expected = direct(encoder, objective, whole)
    batch = by_query(whole, seed, split)
    threads = Workers(workers, list(chunked.parameters())) if workers > 1 else None
    found, metrics = contrastive_step(chunked, other, batch, keep_tokens, workers=threads)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(gradients(chunked, other), expected) < TOLERANCE
    assert set(metrics) == set(contrastive_step(chunked, other, whole, None)[1])


@pytest.mark.parametrize("block", SEPARABLE)
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_encoded_twice(block, workers):
    """With chunks of whole queries, whatever is kept; and no two parts are alive beside each other on one thread."""
    encoder, batch = Counting(), by_query(make_batch(6, 4, 10**6, in_batch=False), seed=1, split=False)
    threads = Workers(workers, list(encoder.parameters())) if workers > 1 else None
    assert build_objective(block).separable
    contrastive_step(encoder, build_objective(block), batch, 0, workers=threads)
    assert set(encoder.seen.values()) == {1} and len(encoder.seen) == 6 * 5


@pytest.mark.parametrize("block", COUPLED)
def test_losses_that_couple_queries_go_as_before(block):
    encoder, batch = Counting(), by_query(make_batch(6, 4, 10**6, in_batch=False), seed=1, split=False)
    assert not build_objective(block).separable
    contrastive_step(encoder, build_objective(block), batch, 0)
    assert set(encoder.seen.values()) == {2}


def test_parts_are_bound_by_queries_in_several_chunks():
    batch = make_batch(3, 2, 10**6, in_batch=False)  # queries 0 1 2, documents 3 4, 5 6, 7 8
    (whole,) = batch.chunks
    rows = dict(zip(whole.index.tolist(), whole.rows, strict=True))

    def cut(*parts):
        return replace(batch, chunks=tuple(Chunk(torch.tensor(one), tuple(rows[i] for i in one)) for one in parts))

    assert whole_parts(cut([0, 3], [1, 5, 6], [4], [2, 7, 8]), 0) == ([[1], [3]], [0, 2], 2)
    assert whole_parts(cut([0, 3], [1, 5, 6], [4], [2, 7, 8]), None) == ([[0, 2], [1]], [3], 0)
    assert whole_parts(cut([0, 3, 4], [1, 5, 6], [2, 7, 8]), 0) == ([[0], [1]], [2], 0)
    assert whole_parts(cut([0, 3, 5], [1, 4, 6, 2], [7, 8]), 0) == ([], [0, 1, 2], 3)
