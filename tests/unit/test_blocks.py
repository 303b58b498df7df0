"""A contrastive loss in blocks of rows is the loss of the whole matrix; masks by tables are masks by comparison."""

from __future__ import annotations

import pytest
import torch

from mmembed.embeddings import Embeddings
from mmembed.losses import LOSSES
from mmembed.objectives import blocks, build_objective
from mmembed.objectives.relations import mark_members
from tests.unit.test_contrastive import make_labels

CASES = {
    "defaults": {},
    "learned temperature": {"temperature": {"value": 0.2, "learn": True}},
    "symmetric": {"symmetric": True, "temperature": 0.2},
    "dot": {"similarity": "dot", "temperature": 3.0},
    "margin": {"false_negative_margin": 0.0, "temperature": 0.2},
    "same tower": {"same_tower_negatives": True, "symmetric": True, "loss": "dcl"},
    "own group only": {"temperature": 0.3},
    **{
        name: {"loss": name, "temperature": 0.3}
        for name, loss in LOSSES.classes().items()
        if loss.objective == "contrastive"
    },
}


def batch(in_batch: bool):
    draw = torch.Generator().manual_seed(0)
    owner = [0, 0, 1, 2, 2, 2, 3, 4, 4]
    vectors = [torch.randn(count, 6, generator=draw, dtype=torch.float64).requires_grad_() for count in (5, len(owner))]
    labels = make_labels(owner, [1, 0, 1, 1, 1, 0, 1, 1, 0], in_batch=in_batch)
    scores = torch.rand(len(owner), generator=draw, dtype=torch.float64)
    taught = tuple(Embeddings(one.detach().flip(1)) for one in vectors)
    return vectors, type(labels)(**{**vars(labels), "scores": scores, "taught": taught})


def all_at_once(objective, gathered):
    """The loss and its metrics through the whole matrix."""
    directions = [gathered] if gathered.reverse is None else [gathered, gathered.reverse]
    losses = [objective.loss(objective._all_scores(one)).mean() * one.weight for one in directions]
    return torch.stack(losses).mean(), objective._metrics([objective._tally(objective._all_scores(gathered), gathered)])


@pytest.mark.parametrize("cells", [1, 25, 2**22])
@pytest.mark.parametrize("name", CASES)
def test_blocks_of_rows_are_the_whole_matrix(monkeypatch, name: str, cells: int) -> None:
    monkeypatch.setattr(blocks, "CELLS", cells)
    objective = build_objective({"type": "contrastive", **CASES[name]}).double()
    (queries, documents), labels = batch(in_batch=name != "own group only")
    gathered = objective.gather(Embeddings(queries), Embeddings(documents), labels)
    leaves = [queries, documents, *objective.parameters()]
    loss, metrics = objective.compare(gathered)
    expected, expected_metrics = all_at_once(objective, gathered)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(3 * of, leaves, retain_graph=True) for of in (loss, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[key], check_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(objective.compare(gathered)[0], expected.detach())


def test_a_loss_of_the_temperature_has_its_gradient_through_blocks() -> None:
    """A loss may use the temperature beside the scores, as a scale does: none of its gradient is lost."""
    left, right = torch.rand(4, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def losses_of(values, rows, of):
        return values.square().sum(1) * of

    loss = blocks.blocked_mean(left, right, temperature, losses_of)
    expected = ((left @ right.T).square().sum(1) * temperature).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(of, temperature)[0] for of in (loss, expected)))


@pytest.mark.parametrize("different", [2, 8, 1000])
@pytest.mark.parametrize("columns", [0, 1, 12])
def test_marks_are_where_sets_hold_the_key(columns: int, different: int) -> None:
    draw = torch.Generator().manual_seed(columns + different)
    sets = torch.randint(-different, different, (7, 3), generator=draw)
    keys = torch.randint(-different, different, (columns,), generator=draw)
    before = torch.rand(7, columns, generator=draw) < 0.2
    marks = before.clone()
    mark_members(marks, sets, keys)
    assert torch.equal(marks, before | (sets[:, :, None] == keys).any(1))


def test_a_plan_scales_a_small_comparison_with_its_blocks() -> None:
    """What 4,096 queries and documents take by the small comparison of a plan is what they take."""
    from mmembed.data.labels import BatchLabels
    from mmembed.training.memory import measure_objective

    def taken(count: int) -> float:
        keys = torch.arange(count).view(-1, 1).expand(-1, 2)
        owner = torch.arange(count)
        labels = BatchLabels(owner, torch.ones(count), keys, owner + count, keys.unsqueeze(1))
        return measure_objective(build_objective("infonce"), labels, 1, 1)

    with blocks.cells_of_a_block(blocks.CELLS // 64):
        small = 64 * taken(512)
    assert small == pytest.approx(taken(4096), rel=0.1)
    assert blocks.CELLS == 2**22
