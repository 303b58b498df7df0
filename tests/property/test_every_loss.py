"""What every loss of the registry must withstand: half precision, empty rows, masks, and batches without anything."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import build_objective

NAMES = list(LOSSES.classes())
CONTRASTIVE = [name for name in NAMES if LOSSES.get(name).objective == "contrastive"]  # others need no positive
TAUGHT = [name for name in NAMES if "score" in LOSSES.get(name).reads]
EDGES = [0.0, 1.0, -1.0, 20.0, -20.0, 100.0]  # cosine / temperature reaches 100


@st.composite
def batches(draw) -> Scores:
    """Rows of any kind: any mask, any grades, equal scores, huge scores, teachers for some."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    cells = rows * columns

    def matrix(elements):
        return torch.tensor(draw(st.lists(elements, min_size=cells, max_size=cells))).view(rows, columns)

    values = matrix(st.sampled_from(EDGES) | st.floats(-20, 20, width=32)).float().requires_grad_()
    relevance = matrix(st.sampled_from([0.0, 0.0, 1.0, 2.0]))
    targets = matrix(st.sampled_from([math.nan, 0.0, 0.5, 1.0, 7.0]))
    return Scores(values, relevance, matrix(st.booleans()), targets, 0.05)


def copied(scores: Scores, valid: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> Scores:
    tensors = [scores.values.detach(), scores.relevance, scores.valid if valid is None else valid, scores.targets]
    return Scores(*(of if columns is None else of[:, columns] for of in tensors), scores.temperature)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(scores=batches())
def test_losses_and_gradients_are_finite(name: str, scores: Scores) -> None:
    losses = LOSSES.build(name)(scores)
    assert losses.shape == (len(scores.values),) and torch.isfinite(losses).all()
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), scores.values)
        assert torch.isfinite(gradient).all()
        assert not gradient[~scores.valid].any()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(scores=batches(), data=st.data())
def test_masking_is_removing(name: str, scores: Scores, data) -> None:
    column = data.draw(st.integers(0, scores.values.shape[1] - 1))
    valid, kept = scores.valid.clone(), torch.arange(scores.values.shape[1]) != column
    valid[:, column] = False
    loss = LOSSES.build(name)
    found = loss(copied(scores, valid=valid))
    if kept.any():
        torch.testing.assert_close(found, loss(copied(scores, columns=kept)), rtol=1e-4, atol=1e-4)
    else:
        assert not found.any()


def normal_batch(dtype: torch.dtype = torch.float64, rows: int = 6, columns: int = 12) -> Scores:
    """One positive a row, the others negatives, all with a teacher's score."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=draw, dtype=dtype) * 4
    targets = torch.rand(rows, columns, generator=draw, dtype=dtype)
    valid = torch.ones(rows, columns, dtype=torch.bool)
    return Scores(values.requires_grad_(), torch.eye(rows, columns).to(dtype), valid, targets)


EMPTY = {
    "no candidate": lambda scores: (scores.relevance, scores.valid.clone().index_fill_(0, torch.tensor(2), False)),
    "no positive": lambda scores: (scores.relevance.clone().index_fill_(0, torch.tensor(2), 0.0), scores.valid),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_an_empty_row_gives_nothing_and_spoils_nothing(name: str, kind: str) -> None:
    scores, loss = normal_batch(), LOSSES.build(name)
    relevance, valid = EMPTY[kind](scores)
    targets = scores.targets.clone()
    targets[2] = math.nan  # nothing to learn from a teacher in that row either
    losses = loss(Scores(scores.values, relevance, valid, targets))
    assert losses[2] == 0 and losses[torch.arange(6) != 2].all()
    (gradient,) = torch.autograd.grad(losses.sum(), scores.values)
    assert torch.isfinite(gradient).all()
    if not (kind == "no positive" and name == "mann_whitney"):  # its negatives count for the other rows
        assert not gradient[2].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_anything_gives_zeros_that_a_backward_may_start_from(name: str) -> None:
    """A process whose share is empty must take part in the backward as all others do."""
    scores = normal_batch()
    nothing = torch.zeros_like(scores.relevance)
    losses = LOSSES.build(name)(Scores(scores.values, nothing, nothing > 0, torch.full_like(nothing, math.nan)))
    assert not losses.any()
    (gradient,) = torch.autograd.grad(losses.sum(), scores.values)
    assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_scores_are_compared_in_single_precision(name: str) -> None:
    loss, exact = LOSSES.build(name), normal_batch(torch.float32)
    rounded = exact.values.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(dataclasses.replace(exact, values=rounded))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss(dataclasses.replace(exact, values=rounded.detach().float())))
    (gradient,) = torch.autograd.grad(losses.sum(), rounded)
    assert gradient.dtype == torch.bfloat16 and torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_every_loss_is_an_objective_under_autocast(name: str, symmetric: bool) -> None:
    queries, documents = (
        torch.randn(count, 16, generator=torch.Generator().manual_seed(count)).requires_grad_() for count in (4, 8)
    )
    keys = torch.arange(8).view(-1, 1).expand(-1, 2)
    labels = BatchLabels(
        owner=torch.arange(4).repeat_interleave(2),
        relevance=torch.tensor([1.0, 0.0] * 4),
        document_keys=keys,
        query_keys=torch.arange(100, 104),
        positive_keys=keys[::2].unsqueeze(1),
        scores=torch.tensor([0.9, 0.2, 0.8, 0.1, 0.7, 0.3, 0.95, 0.0]),
        taught=(Embeddings(queries.detach()), Embeddings(documents.detach())),
    )
    objective = build_objective({"type": name, "symmetric": symmetric, "same_tower_negatives": True})
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(Embeddings(queries), Embeddings(documents), labels)
    loss.backward()
    assert torch.isfinite(loss)
    for side in (queries, documents):
        assert torch.isfinite(side.grad).all() and side.grad.any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"dcd"}))  # its weights have no gradient by definition
def test_gradients_are_those_of_the_value(name: str) -> None:
    scores = normal_batch(rows=4, columns=7)
    loss = LOSSES.build(name)
    torch.autograd.gradcheck(
        lambda values: loss(dataclasses.replace(scores, values=values)), scores.values, eps=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("name", TAUGHT)
def test_an_infinite_teacher_is_refused(name: str) -> None:
    scores = normal_batch()
    with pytest.raises(ConfigError, match=f"losses.{name}: .*infinite"):
        LOSSES.build(name)(dataclasses.replace(scores, targets=torch.full_like(scores.targets, math.inf)))
