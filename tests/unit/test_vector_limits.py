"""Objectives over vectors where their equations have a root or a power without bound, and terms against loops."""

import pytest
import torch
from torch.nn import functional

from mmembed.objectives.gram import volumes
from mmembed.objectives.isogclr import State, robust
from mmembed.objectives.metrix import mixed_distances
from mmembed.objectives.softmax import both_ways
from tests.golden.case import apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modalities", [3, 4])
def test_gram_where_modalities_coincide(dtype, modalities) -> None:
    """The determinant is 0 there; the gradient of its root must be finite."""
    views = functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=dtype), dim=-1)
    anchors, others = views.clone().requires_grad_(), views.expand(modalities - 1, -1, -1).clone().requires_grad_()
    both_ways(-volumes(anchors, others) / 0.07, apart(4)).mean().backward()
    assert torch.isfinite(anchors.grad).all() and torch.isfinite(others.grad).all()


def test_gram_volume_of_four_modalities() -> None:
    """Against the determinant of torch.linalg."""
    views = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = functional.normalize(views, dim=-1)
    rows = torch.stack([torch.stack([views[0, 0], *views[1:, j]]) for j in range(3)])  # (3, 4, E)
    expected = torch.linalg.det(rows @ rows.mT).sqrt()
    torch.testing.assert_close(volumes(views[0], views[1:])[0], expected)


def test_isogclr_does_not_overflow_at_its_lowest_temperature() -> None:
    """e^(2 / .005) is no float; the weights are."""
    state = State(torch.zeros(2), torch.full((2,), 0.005), torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    scores = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], requires_grad=True)
    surrogate, log_u, _ = robust(scores, apart(2), state, 0.8)
    surrogate.sum().backward()
    assert torch.isfinite(scores.grad).all() and log_u.tolist() == pytest.approx([400.0, 400.0])


def test_distances_of_mixtures_against_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, positives = (functional.normalize(torch.randn(4, 6, generator=draw), dim=1) for _ in range(2))
    found = mixed_distances(queries, positives, 0.3)
    for i in range(4):
        for j in range(4):
            mixed = functional.normalize(0.3 * positives[i] + 0.7 * positives[j], dim=0)
            assert found[i, j].item() == pytest.approx((queries[i] - mixed).norm().item(), abs=1e-5)
