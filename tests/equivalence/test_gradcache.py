"""The chunked step gives the gradient of the undivided batch: any chunking, kept or recomputed, with dropout."""

import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import MmembedError
from mmembed.objectives import build_objective
from mmembed.training.gradcache import RandomState, Workers, contrastive_step
from tests.equivalence.toy import ToyEncoder, gradients, make_batch, relative
from tests.runs import in_two_processes

TOLERANCE = 1e-5
LEARNED = {"type": "contrastive", "temperature": {"value": 0.1, "learn": True}}


def direct(encoder, objective, batch):
    """Plain autograd over one undivided chunk."""
    (chunk,) = batch.chunks
    vectors = encoder(chunk).rows(chunk.index.argsort())
    loss, _ = objective(
        vectors.rows(batch.place[: batch.n_queries]), vectors.rows(batch.place[batch.n_queries :]), batch.labels
    )
    loss.backward()
    return loss.detach(), gradients(encoder, objective)


@settings(max_examples=40, deadline=None)
@given(
    chunk_tokens=st.integers(1, 300),
    chunk_rows=st.one_of(st.none(), st.integers(1, 9)),
    keep_tokens=st.one_of(st.none(), st.integers(0, 300)),
    seed=st.integers(0, 5),
    block=st.sampled_from(
        [
            LEARNED,
            {**LEARNED, "symmetric": True},
            {**LEARNED, "matryoshka": {"dims": [8, 4]}},
            {"by_task": {"sts": ["pro", {**LEARNED, "type": "rank_kl", "matryoshka": {"dims": [8, 4]}}]}},
            {**LEARNED, "matryoshka": {"dims": [8, 4], "layers": [1, -1]}},
            [{**LEARNED, "layer": "middle"}, {**LEARNED, "weight": 0.5}],
        ]
    ),
    multi_vector=st.booleans(),
    workers=st.integers(1, 3),
)
def test_any_chunking_equals_the_direct_step(chunk_tokens, chunk_rows, keep_tokens, seed, block, multi_vector, workers):
    objective, chunked_objective = build_objective(block, depth=2), build_objective(block, depth=2)
    encoder, chunked = (ToyEncoder(multi_vector=multi_vector, layers=objective.layers) for _ in range(2))
    graded = "by_task" in block
    loss, expected = direct(encoder, objective, make_batch(6, 3, 10**6, seed=seed, graded=graded))
    batch = make_batch(6, 3, chunk_tokens, chunk_rows, seed=seed, graded=graded)
    threads = Workers(workers, list(chunked.parameters())) if workers > 1 else None
    found_loss, _ = contrastive_step(chunked, chunked_objective, batch, keep_tokens, workers=threads)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(gradients(chunked, chunked_objective), expected) < TOLERANCE


@pytest.mark.parametrize("workers", [1, 2])
def test_matrices_of_the_pairs_are_gone_before_the_second_pass(workers):
    """They are as large as a chunk's activations where the batch is large."""
    encoder, objective = ToyEncoder(), build_objective(LEARNED)
    gathered, alive, gather = [], [], objective.gather

    def watched(*given):
        found = gather(*given)
        gathered.append(weakref.ref(found.relevance))
        return found

    def encode(chunk):
        alive.extend(one() is not None for one in gathered)
        return encoder(chunk)

    objective.gather = watched
    threads = Workers(workers, list(encoder.parameters())) if workers > 1 else None
    contrastive_step(encode, objective, make_batch(6, 3, 25), 0, workers=threads)
    assert len(alive) > 2 and not any(alive)


@pytest.mark.parametrize("keep_tokens", [0, 20, 60, None])
def test_dropout_repeats_in_the_second_pass(keep_tokens):
    """All graphs kept is plain autograd; recomputing any of them must change neither gradient nor what comes next."""
    results = []
    for keep in (None, keep_tokens):
        encoder, objective = ToyEncoder(dropout=0.5), build_objective(LEARNED)
        torch.manual_seed(7)
        contrastive_step(encoder, objective, make_batch(6, 3, 25), keep)
        results.append((gradients(encoder, objective), torch.rand(1)))
    assert relative(results[1][0], results[0][0]) < TOLERANCE
    assert torch.equal(results[1][1], results[0][1])


def test_random_state_is_of_the_cpu_and_the_current_device(monkeypatch):
    """A stand-in for an accelerator with its own generator: what MPS and CUDA have in common."""
    generator = torch.Generator().manual_seed(1)
    device = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    state = RandomState.capture()
    drawn = [torch.rand(3), torch.rand(3, generator=generator)]
    state.restore()
    assert all(map(torch.equal, [torch.rand(3), torch.rand(3, generator=generator)], drawn))


def test_dropout_is_on():
    """Otherwise the test above could not fail."""
    batch = make_batch(6, 3, 25)
    encoder = ToyEncoder(dropout=0.5)
    assert not torch.equal(encoder(batch.chunks[0]).vectors, encoder(batch.chunks[0]).vectors)


def test_gradients_accumulate_and_scale():
    encoder, objective = ToyEncoder(), build_objective(LEARNED)
    batch = make_batch(6, 3, 40)
    contrastive_step(encoder, objective, batch, None)
    once = gradients(encoder, objective)
    contrastive_step(encoder, objective, batch, 0, scale=0.5)
    assert relative(gradients(encoder, objective), 1.5 * once) < TOLERANCE


@pytest.mark.distributed
def test_two_processes_equal_one():
    """Uneven chunks and positives, a parameter that one process alone uses, learned temperature, symmetric, maxsim, a
    known positive that lies on the other process; losses that couple rows, negatives of the same tower; vectors of two
    layers, with alignment over as many rows on both; an objective by task; a mean over the tokens of both; and
    negatives or graded pairs of each process alone: the mean of two runs."""
    run = in_two_processes("tests.equivalence.two_processes")
    found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    assert len(found) == 18
    for name, (loss, gradient) in found.items():
        assert loss < TOLERANCE, name
        assert gradient < TOLERANCE, name


@pytest.mark.parametrize("block", ["infonce", "mann_whitney", "gram", "whitened", [{"type": "infonce"}, "uniformity"]])
@pytest.mark.parametrize("keep_tokens", [None, 0])
def test_what_is_not_finite_ends_the_run(block, keep_tokens):
    """By name, before the weights are touched; under float16 the loss scale skips the step."""
    block = {"type": "whitened", "group_size": 2} if block == "whitened" else block
    objective, encoder, batch = build_objective(block), ToyEncoder(), make_batch(6, 3, 30)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    names = "infonce.*uniformity" if isinstance(block, list) else objective.title
    with pytest.raises(MmembedError, match=f"source '{batch.labels.source}', objective '{names}.*: the vectors of a"):
        contrastive_step(encoder, objective, batch, keep_tokens)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    if block == "infonce":
        loss, _ = contrastive_step(encoder, objective, batch, keep_tokens, may_overflow=True)
        assert loss.isnan()


def test_a_loss_that_is_not_finite_ends_the_run():
    objective = build_objective({"type": "infonce", "temperature": 1e-39})
    with pytest.raises(MmembedError, match="objective 'infonce': the loss of a batch is not finite"):
        contrastive_step(ToyEncoder(), objective, make_batch(6, 3, 30), None)
