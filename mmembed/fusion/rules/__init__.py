"""Rules of fusion: of one tensor, the weights by which the models are summed. Tensors in, numbers out; no files.

    rule = RULES.build("uniform")  # or {"type": "slerp", "t": 0.3}
    weights = rule.weights(name, base, tensors)  # one a model
    fused = rule.combine(base, tensors, weights)

With K models theta_k and their common start theta_0, a rule gives w_k of this tensor, and the fused tensor is

    sum_k w_k theta_k                              of a rule that is not `relative`
    theta_0 + sum_k w_k (theta_k - theta_0)        of one that is: it weighs what training changed

Both are computed as a sum of differences from one of the tensors: fine-tuned models differ little, so in float32 that
sum is rounded less than a sum of the tensors, and equal models give themselves, bit by bit. Cost: one pass over each
tensor; some rules look at the tensors for their weights, which is a second one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.registry import Registry


class Rule(ABC):
    """How models are summed. A subclass is one file here; its constructor's arguments are the options.

    Attributes:
        relative: it weighs differences from the tensors that training started from, which it needs.
        least, most: how many models it takes; `most` None: any number.
    """

    name: ClassVar[str]
    relative: ClassVar[bool] = False
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None

    def check(self, count: int) -> None:
        """Raises ConfigError where it cannot fuse so many models."""
        if count < self.least or (self.most is not None and count > self.most):
            takes = f"{self.least} or more" if self.most is None else f"{self.most}"
            raise ConfigError(f"rules.{self.name}: {count} models were given; it takes {takes}")

    @abstractmethod
    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        """The K weights of one tensor.

        Args:
            name: of the tensor in the model.
            base: float32, what training started from; given where the rule is `relative`.
            tensors: K float32 tensors of one shape, which are not changed.

        Raises:
            ConfigError: the rule has nothing to say of this tensor.
        """

    def combine(self, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The fused tensor, float32.

        >>> import torch
        >>> from mmembed.fusion.rules.uniform import Uniform
        >>> Uniform().combine(None, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], [0.5, 0.5])
        tensor([2., 1.])
        """
        if self.relative:
            assert base is not None
            start, total = base, 1.0
        else:  # the heaviest: one model alone gives itself
            start, total = tensors[max(range(len(tensors)), key=lambda k: abs(weights[k]))], math.fsum(weights)
        fused = start * total
        for tensor, weight in zip(tensors, weights, strict=True):
            if weight and tensor is not start:
                fused.add_(tensor - start, alpha=weight)
        return fused


RULES: Registry[Rule] = Registry("mmembed.fusion.rules", Rule)  # type: ignore[type-abstract]  # a family's base
