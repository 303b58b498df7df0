"""InfoNCE against its equation written with plain loops."""

import math

import pytest
import torch

from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores


def looped(values, relevance, valid, negatives):
    losses = []
    for row, grades, allowed in zip(values.tolist(), relevance.tolist(), valid.tolist(), strict=True):
        columns = [j for j in range(len(row)) if allowed[j]]
        positives = [j for j in columns if grades[j] > 0]
        total = sum(grades[j] for j in positives)
        loss = 0.0
        for p in positives:
            against = [j for j in columns if j != p and (negatives == "all" or grades[j] < grades[p])]
            denominator = math.exp(row[p]) + sum(math.exp(row[j]) for j in against)
            loss -= grades[p] / total * math.log(math.exp(row[p]) / denominator)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("negatives", ["lower", "all"])
@pytest.mark.parametrize("grades", [4, 2, None], ids=["four grades", "ungraded", "no two alike"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_equation(negatives, grades, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 9, generator=generator, dtype=torch.float64) * 4
    relevance = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    relevance = (relevance - 0.3).clamp_min(0) if grades is None else (relevance * grades).floor()
    valid = torch.rand(6, 9, generator=generator) < 0.8
    relevance[0] = 0  # a row without a positive
    valid[1] = relevance[1] > 0  # a row without a negative
    loss = LOSSES.build({"type": "infonce", "negatives": negatives})(Scores(values, relevance, valid))
    assert loss.tolist() == pytest.approx(looped(values, relevance, valid, negatives), abs=1e-9)


@pytest.mark.parametrize("negatives", ["lower", "all"])
def test_gradient_is_finite_without_positives_or_negatives(negatives):
    values = torch.randn(3, 4, requires_grad=True)
    relevance = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    valid = torch.tensor([[True] * 4, [True, False, False, False], [True] * 4])
    LOSSES.build({"type": "infonce", "negatives": negatives})(Scores(values, relevance, valid)).sum().backward()
    assert torch.isfinite(values.grad).all()
    assert values.grad[0].abs().sum() == 0
    assert values.grad[1].abs().sum() == 0
    nothing = Scores(values, torch.zeros(3, 4), valid)
    assert not LOSSES.build({"type": "infonce", "negatives": negatives})(nothing).any()


def test_is_exact_where_the_loss_is_tiny():
    """float32 log_softmax rounds 1e-9 to 0; the gradient must survive."""
    values = torch.tensor([[20.0, 0.0]], requires_grad=True)
    scores = Scores(values, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss = LOSSES.build("infonce")(scores)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)
    assert values.grad[0, 1].item() == pytest.approx(math.exp(-20) / (1 + math.exp(-20)), rel=1e-5)


def test_unknown_negatives():
    with pytest.raises(ConfigError, match="lower"):
        LOSSES.build({"type": "infonce", "negatives": "some"})


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="share one"):
        Scores(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))
