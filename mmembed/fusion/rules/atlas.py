"""What training changed in each model, with a coefficient of its own for each tensor.

    theta_b = theta_0b + sum_k Lambda_kb (theta_kb - theta_0b)       of each tensor b

aTLAS (Zhang et al., arXiv 2407.02880): the coefficients are learned on a few labelled examples, from 0, while the task
vectors stand still (`mmembed.fusion.learning`). They are few (models times tensors), so a few hundred records do.

When: models of other domains or tasks, and a small labelled set of the one that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.fusion.rules import Rule


class Atlas(Rule):
    """What training changed in each model, with a coefficient of its own for each tensor.

    Args:
        coefficients: tensor -> one number a model. A tensor that is not named has to be the start's in every model.
    """

    name = "atlas"
    relative = True

    def __init__(self, coefficients: dict[str, list[float]]) -> None:
        self.coefficients = coefficients

    def check(self, count: int) -> None:
        for name, numbers in self.coefficients.items():
            if len(numbers) != count:
                raise ConfigError(
                    f"rules.atlas.coefficients: {len(numbers)} of '{name}' for {count} models; they were learned for "
                    "others"
                )

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        if name in self.coefficients:
            return self.coefficients[name]
        if base is None or any(not tensor.equal(base) for tensor in tensors):
            raise ConfigError(
                f"rules.atlas.coefficients: nothing is said of '{name}', which a model changed; they were learned for "
                "others"
            )
        return [0.0] * len(tensors)
