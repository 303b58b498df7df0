"""What training changed in each model, added to the start or taken away from it.

    theta = theta_0 + sum_k a_k (theta_k - theta_0)

Task arithmetic (Ilharco et al., arXiv 2212.04089): 1 and 1 adds two abilities, -1 alone forgets one. mergekit's
`task_arithmetic` with `normalize: false` and `lambda: 1`.

When: abilities that should all be kept, where a mean would halve each; unlearning a domain or a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.fusion.rules import Rule


class TaskVectors(Rule):
    """What training changed in each model, added to the start or taken away from it.

    Args:
        weights: one a model, negative to take away; None: 1 each.
    """

    name = "task_vectors"
    relative = True

    def __init__(self, weights: list[float] | None = None) -> None:
        self.given = weights

    def check(self, count: int) -> None:
        if self.given is not None and len(self.given) != count:
            raise ConfigError(
                f"rules.task_vectors.weights: {len(self.given)} weights of {count} models; give one a model"
            )

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        return [1.0] * len(tensors) if self.given is None else self.given
