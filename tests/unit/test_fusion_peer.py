"""Rules against mergekit's own, where that is installed (pip install mergekit): equal to 2e-6 in float32."""

from typing import Any

import pytest
import torch

from mmembed.fusion.rules import RULES

pytest.importorskip("mergekit", reason="mergekit is not installed; test_fusion has its equations")


def tensors(spread: float) -> list[torch.Tensor]:
    """A start and two models that differ from it by `spread`."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator)
    return [start, *(start + torch.randn(40, 30, generator=generator) * spread for _ in range(2))]


def theirs(method: str, given: list[torch.Tensor], base: int | None, **parameters: Any) -> torch.Tensor:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    group = TensorGroup.from_tensors(given, base_index=base)
    return registry.get(method)([group], parameters=parameters)[0]


def ours(rule: dict[str, Any], start: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    built = RULES.build(rule)
    return built.combine(start, models, built.weights("x", start, models))


@pytest.mark.parametrize("spread", [0.001, 0.5, 3.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t, spread):
    start, *models = tensors(spread)
    expected = theirs("slerp", models, 0, t=t)
    torch.testing.assert_close(ours({"type": "slerp", "t": t}, start, models), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
def test_linear(weights):
    start, *models = tensors(0.5)
    expected = theirs("linear", models, None, weight=dict(enumerate(weights)), normalize=True)
    torch.testing.assert_close(ours({"type": "linear", "weights": weights}, start, models), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -0.5]])
def test_task_vectors(weights):
    start, *models = tensors(0.5)
    given = {1: weights[0], 2: weights[1]}
    expected = theirs("task_arithmetic", [start, *models], 0, weight=given, normalize=False)
    found = ours({"type": "task_vectors", "weights": weights}, start, models)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
