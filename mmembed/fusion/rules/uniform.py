"""The mean of the models: a uniform soup.

    w_k = 1 / K

Model soups (Wortsman et al., arXiv 2203.05482): fine-tuned models of one start lie in one basin, so their mean is
often better than each, at the cost of one. Which models go in may be chosen by a validation score (`--greedy`).

When: several runs of one recipe (seeds, learning rates), and as the control of every other rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmembed.fusion.rules import Rule


class Uniform(Rule):
    """The mean of the models."""

    name = "uniform"

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        return [1 / len(tensors)] * len(tensors)
