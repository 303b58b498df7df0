"""A weighted mean of the models.

    w_k = a_k / sum_j a_j

The mean of model soups (arXiv 2203.05482) with weights of your own; mergekit's `linear` with `normalize: true`.

When: one model matters more than another, or the way between two is to be walked in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.fusion.rules import Rule


class Linear(Rule):
    """A weighted mean of the models.

    Args:
        weights: one a model; divided by their sum, so (3, 1) and (0.75, 0.25) are the same.

    Raises:
        ConfigError: the weights have no positive sum.
    """

    name = "linear"

    def __init__(self, weights: list[float]) -> None:
        total = math.fsum(weights)
        if not total > 0:
            raise ConfigError(f"rules.linear.weights: the sum of {weights} is not above 0; rule task_vectors subtracts")
        self.given = [one / total for one in weights]

    def check(self, count: int) -> None:
        if len(self.given) != count:
            raise ConfigError(f"rules.linear.weights: {len(self.given)} weights of {count} models; give one a model")

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        return self.given
