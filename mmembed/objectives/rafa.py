"""Random feature alignment: both vectors of a pair are drawn to one random point (RaFA of CLIP-Refine).

L = mean_{i, d} (x_id - r_id)^2 + mean_{i, d} (y_id - r_id)^2,  r_i ~ N(0, I)

Over unit vectors x and y (arXiv 2504.12717). The same r for both sides (the path of the released code with a noise each
has a wrong variable). It closes the gap between modalities without a contrast; beside it `hycd` keeps what the model
knows: `[rafa, hycd]` is CLIP-Refine with its weights 1 and 1. Numbers follow from (seed, step), the same in all
processes. The mean is over N E values, so the gradient is small by E: that is as published, with AdamW. Cost: (N, E)
floats.

When: as a term, to close the gap of modalities after training; with `hycd` it is CLIP-Refine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs, generator_at


class RaFA(Aligned):
    """Draws both sides of a pair to one random vector.

    Args:
        seed: of the random vectors.
    """

    name = "rafa"
    step: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        generator = generator_at(self.seed, int(self.step))
        reference = torch.randn(pairs.queries.shape, generator=generator).to(pairs.queries)  # (N, E)
        return random_alignment(*pairs.unit, reference), {}

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)


def random_alignment(x: Tensor, y: Tensor, reference: Tensor) -> Tensor:
    """(N, E) three times -> scalar.

    >>> random_alignment(torch.eye(2), torch.eye(2), torch.zeros(2, 2))
    tensor(1.)
    """
    return (x - reference).square().mean() + (y - reference).square().mean()
