"""Losses of rerankers against loops, and the objectives that read the logits of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import OBJECTIVES, build_objective
from tests.golden.case import labels_of


def softplus(value):
    return math.log1p(math.exp(-abs(value))) + max(value, 0.0)


def sft(values, grades):
    return sum(softplus(-v if g > 0 else v) for v, g in zip(values, grades, strict=True)) / len(values)


def balanced(values, grades):
    sides = [[softplus(-v) for v, g in zip(values, grades, strict=True) if g > 0]]
    sides += [[softplus(v) for v, g in zip(values, grades, strict=True) if g <= 0]]
    means = [sum(side) / len(side) for side in sides if side]
    return sum(means) / len(means)


def pairs(grades):
    return [(a, b) for a in range(len(grades)) for b in range(len(grades)) if grades[a] > grades[b]]


def ranknet(values, grades):
    found = [softplus(values[b] - values[a]) for a, b in pairs(grades)]
    return sum(found) / max(1, len(found))


def lambdarank(values, grades, k=None):
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    rank = {place: number + 1 for number, place in enumerate(order)}

    def discount(number):
        return 1 / math.log2(1 + number) if k is None or number <= k else 0.0

    ideal = sum((2**g - 1) * discount(n + 1) for n, g in enumerate(sorted(grades, reverse=True)))
    total = 0.0
    for a, b in pairs(grades):
        change = abs(2 ** grades[a] - 2 ** grades[b]) * abs(discount(rank[a]) - discount(rank[b]))
        total += softplus(values[b] - values[a]) * change / ideal
    return total


def listmle(values, grades):
    order = sorted(range(len(values)), key=lambda place: (-grades[place], -values[place], place))
    total, positives = 0.0, sum(g > 0 for g in grades)
    for number, place in enumerate(order):
        if grades[place] > 0:
            total += math.log(sum(math.exp(values[one]) for one in order[number:])) - values[place]
    return total / max(1, positives)


LOOPS = {
    "sft": ("sft", sft),
    "balanced": ({"type": "sft", "balanced": True}, balanced),
    "ranknet": ("ranknet", ranknet),
    "lambdarank": ("lambdarank", lambdarank),
    "lambdarank@2": ({"type": "lambdarank", "k": 2}, lambda values, grades: lambdarank(values, grades, 2)),
    "listmle": ("listmle", listmle),
}


@pytest.mark.parametrize("name", LOOPS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4))
def test_losses_against_loops(name, seed, lengths):
    block, loop = LOOPS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    grades = torch.randint(0, 4, shape, generator=generator).double()
    valid = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    grades[:, 0] += (~((grades > 0) & valid).any(1)).double()  # a positive in each row
    found = LOSSES.build(block)(Scores(values, grades, valid))
    for row, length in enumerate(lengths):
        own = values[row, :length].tolist(), grades[row, :length].tolist()
        assert found[row].item() == pytest.approx(loop(*own), abs=1e-9), name


@pytest.mark.parametrize("block", [block for block, _ in LOOPS.values()], ids=str)
def test_gradients_are_finite_where_rows_are_padded_and_scores_are_far_apart(block):
    values = torch.tensor([[80.0, -80.0, 3.0], [0.0, 1.0, -1e4]], requires_grad=True)
    grades, valid = torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True, True, False]])
    LOSSES.build(block)(Scores(values, grades, valid)).sum().backward()
    assert values.grad.isfinite().all() and values.grad[1, 2] == 0 and values.grad[0].abs().sum() > 0


def test_groups_of_different_sizes_are_rows_of_their_own():
    """The mean over queries, whatever other queries' documents score."""
    labels = labels_of(2, 5, 3, in_batch=False)  # three documents, then two
    logits = torch.randn(5, 2, dtype=torch.float64)
    objective = build_objective({"type": "ranking", "loss": "infonce", "temperature": 0.5})
    loss, metrics = objective(Embeddings(logits[[0, 3]]), Embeddings(logits), labels)
    scores = (logits[:, 0] - logits[:, 1]) * 2
    parts = [-scores[:3].log_softmax(0)[0], -scores[3:].log_softmax(0)[0]]
    assert loss.item() == pytest.approx(float(sum(parts)) / 2, abs=1e-12)
    best = [scores[:3].argmax() == 0, scores[3:].argmax() == 0]
    assert metrics["precision_at_1"].item() == pytest.approx(sum(map(float, best)) / 2)


def test_one_is_the_gradient_of_the_loss_that_it_is_made_of():
    """GMR's surrogate with the weight and the direction of a loss has that loss's gradient."""
    labels = labels_of(2, 8, 4, in_batch=False)
    for name, loss in (("sft", {"type": "sft"}), ("contrastive", {"type": "infonce"})):
        gradients = []
        score = "difference" if name == "sft" else "yes"
        block = {"type": "weight_direction", "weight": name, "direction": name}
        for one in ({"type": "ranking", "loss": loss, "score": score}, block):
            logits = torch.linspace(-1, 2, 16, dtype=torch.float64).sin().view(8, 2).clone().requires_grad_()
            value, _ = build_objective(one)(Embeddings(logits[::4]), Embeddings(logits), labels)
            value.backward()
            gradients.append(logits.grad)
        factor = 1 if name == "sft" else 4  # documents a query
        assert torch.allclose(gradients[0], gradients[1] * factor, atol=1e-12), name


JUDGES = [{"type": name} for name, cls in OBJECTIVES.classes().items() if cls.judges and not cls.answers]
JUDGES += [{"type": "ranking", "loss": name} for name in ("infonce", "ranknet", "lambdarank", "listmle", "listnet")]


@pytest.mark.parametrize("block", JUDGES, ids=str)
@pytest.mark.parametrize("kind", ["equal", "bfloat16", "float16", "autocast", "no positive"])
def test_every_ranking_objective_is_finite(block, kind):
    labels = labels_of(3, 12, 4, in_batch=False)
    if kind == "no positive":
        labels.relevance[4:8] = 0
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)
    logits = (torch.zeros(12, 2) if kind == "equal" else torch.randn(12, 2)).to(dtype).requires_grad_()
    objective = build_objective(block)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss, metrics = objective(Embeddings(logits[::4]), Embeddings(logits), labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (kind == "equal" or logits.grad.abs().sum() > 0)
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())


def test_what_a_ranking_objective_refuses():
    with pytest.raises(ConfigError, match="logits of pairs cannot be cut"):
        build_objective({"type": "sft", "matryoshka": {"dims": [1]}})
    with pytest.raises(ConfigError, match="reads the logits of the last layer"):
        build_objective([{"type": "sft"}, {"type": "sft", "layer": 1}])
    with pytest.raises(ConfigError, match="score: there is no 'both'; known: difference, yes"):
        build_objective({"type": "ranking", "score": "both"})
    with pytest.raises(ConfigError, match="weight: there is no 'two'"):
        build_objective({"type": "weight_direction", "weight": "two"})
