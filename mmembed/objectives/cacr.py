"""Contrastive attraction and repulsion: far positives pull more, near negatives push more; no logarithm.

L = sum_p w+_p c(x, x+_p) - sum_n w-_n c(x, x-_n),  w+ = softmax(t+ c),  w- = softmax(-t- c),  c = |a - b|^2

(Zheng et al., arXiv 2105.03746.) Attraction: each view of a sample is a query of its other views. Repulsion: for each
two views, a row of the first against the other samples of the second. With two views w+ is 1 and only the repulsion is
weighted. Unit vectors bound the repulsion, so the loss is at most 4 away from 0. Gradients flow through the weights as
in the authors' small-scale code; `detach_weights` stops them as in their ImageNet code. Cost: (N, N) a pair of views.

When: batches are small, and hard pairs should weigh more without a temperature to tune.
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.alignment import squared_distances
from mmembed.registry import Above0, Positive

T_POSITIVE = 1.0


class CACR(Aligned):
    """Weighted squared distances: attraction of the views of a sample, repulsion of other samples.

    Args:
        t_positive, t_negative: how much the weights follow the distance; 1 and 1 in the paper's ablation-free setting.
            `t_positive` (default 1) acts with 3 views and more.
        alpha, beta: weights of attraction and repulsion, 1 each.
        views: of a sample, the query among them; with 3 and more the weights of the positives matter.
        detach_weights: no gradient through the weights.
    """

    name = "cacr"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        t_positive: Above0 | None = None,
        t_negative: Above0 = 1.0,
        alpha: Above0 = 1.0,
        beta: Above0 = 1.0,
        views: Annotated[Positive, Field(ge=2)] = 2,
        detach_weights: bool = False,
    ) -> None:
        super().__init__()
        if t_positive is not None and views == 2:
            raise ConfigError(
                f"objectives.cacr.t_positive: {t_positive:g} has no effect with views: 2, where a sample has one "
                "positive, whose weight is 1; remove it, or set views to 3 or more"
            )
        self.t_positive = T_POSITIVE if t_positive is None else t_positive
        self.t_negative, self.alpha, self.beta = t_negative, alpha, beta
        self.positives_needed, self.detach_weights = views - 1, detach_weights

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        pull = attraction(pairs.unit_views, self.t_positive, self.detach_weights)
        push = repulsion(pairs.unit_views, pairs.same, self.t_negative, self.detach_weights)
        return self.alpha * pull - self.beta * push, {"attraction": pull.detach(), "repulsion": push.detach()}


def attraction(views: Tensor, t: float = 1.0, detach_weights: bool = False) -> Tensor:
    """Unit vectors (V, N, E) -> mean weighted squared distance of a view to the other views of its sample.

    >>> attraction(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    tensor(2.)
    """
    costs = (views[:, None] - views).square().sum(-1).permute(2, 0, 1)  # (N, V, V)
    others = ~torch.eye(len(views), dtype=torch.bool, device=views.device).expand_as(costs)
    return _weighted(costs, t * costs, others, detach_weights).mean()


def repulsion(views: Tensor, same: Tensor, t: float = 1.0, detach_weights: bool = False) -> Tensor:
    """Unit vectors (V, N, E), (N, N) bool -> mean weighted squared distance to the samples that are not the same.

    >>> repulsion(torch.eye(2).expand(2, -1, -1), torch.eye(2).bool())
    tensor(2.)
    """
    found = []
    for first, second in combinations(views, 2):
        costs = squared_distances(first, second)  # (N, N)
        found.append(_weighted(costs, -t * costs, ~same, detach_weights).mean())
    return torch.stack(found).mean()


def _weighted(costs: Tensor, exponents: Tensor, counted: Tensor, detach_weights: bool) -> Tensor:
    """Mean of the last dimension with softmax weights over what counts; 0 where nothing does."""
    floor = torch.finfo(costs.dtype).min / 2
    weights = exponents.masked_fill(~counted, floor).softmax(-1) * counted
    return ((weights.detach() if detach_weights else weights) * costs).sum(-1)
