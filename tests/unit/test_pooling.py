"""Poolings on numbers small enough to work out by hand."""

import pytest
import torch

from mmembed.pooling import POOLINGS

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
