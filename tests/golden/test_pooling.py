"""Poolings against numbers from outside: by hand; latent attention by plain loops (and in `single.py`)."""

from __future__ import annotations

import math

import pytest
import torch

from mmembed.pooling import POOLINGS


def test_printed_equation_by_plain_loops() -> None:
    """O = softmax(Q K^T) V with K = V = latents; linear, exact GELU, linear; mean over the mask."""
    torch.manual_seed(0)
    block = {"type": "latent_attention", "num_latents": 3, "feed_forward_multiplier": 2, "variant": "printed"}
    pooling = POOLINGS.build(block, hidden_size=4).double()
    hidden, mask = torch.randn(1, 3, 4, dtype=torch.float64), torch.tensor([[False, True, True]])
    first, _, second = pooling.mlp
    total = [0.0] * 4
    for token in hidden[0, 1:].tolist():
        scores = [sum(a * b for a, b in zip(token, latent, strict=True)) for latent in pooling.latents.tolist()]
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        mixed = [
            sum(w * latent[i] for w, latent in zip(weights, pooling.latents.tolist(), strict=True)) for i in range(4)
        ]
        inner = [
            sum(w * x for w, x in zip(row, mixed, strict=True)) + bias
            for row, bias in zip(first.weight.tolist(), first.bias.tolist(), strict=True)
        ]
        inner = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in inner]
        for index, (row, bias) in enumerate(zip(second.weight.tolist(), second.bias.tolist(), strict=True)):
            total[index] += (sum(w * x for w, x in zip(row, inner, strict=True)) + bias) / 2
    assert torch.allclose(pooling(hidden, mask).double(), torch.tensor([total], dtype=torch.float64), atol=1e-6)


def test_the_two_variants_differ_and_both_learn() -> None:
    for options in ({"variant": "released", "num_heads": 2}, {"variant": "printed"}):
        pooling = POOLINGS.build({"type": "latent_attention", "num_latents": 5, **options}, hidden_size=8)
        pooling(torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)).sum().backward()
        assert all(parameter.grad is not None for parameter in pooling.parameters())


HIDDEN = torch.tensor([[[100.0, 0.0], [6.0, 12.0], [-100.0, 50.0], [12.0, 0.0], [18.0, 6.0], [100.0, 100.0]]])
MASK = torch.tensor([[False, True, False, True, True, False]])  # padded on both sides, and a hole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", [12.0, 6.0]),  # (6 + 12 + 18) / 3, (12 + 0 + 6) / 3
        ("weighted_mean", [14.0, 5.0]),  # 1/6, 2/6, 3/6: 1 + 4 + 9, 2 + 0 + 3
        ("last_token", [18.0, 6.0]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    assert POOLINGS.build(name, hidden_size=2)(HIDDEN, MASK).tolist() == [pytest.approx(expected)]


def test_multi_vector_by_hand() -> None:
    pooling = POOLINGS.build({"type": "multi_vector", "dim": None}, hidden_size=2)
    zero = [0.0, 0.0]
    assert pooling(HIDDEN, MASK).tolist() == [[zero, [6.0, 12.0], zero, [12.0, 0.0], [18.0, 6.0], zero]]
