"""Supervised contrastive loss: everything of one class is a positive of everything else of it.

L = mean_i -(tau / tau_base) / |P(i)| sum_{p in P(i)} log( e^{z_i.z_p / tau} / sum_{a != i} e^{z_i.z_a / tau} )

(Khosla et al., arXiv 2004.11362, eq. 2, L_out.) The two views of a sample are a query and its positive; samples are of
one class where they share a document by content or by id (documents that stand for a class carry its name as id), or
the query. Cost: (2 N, 2 N) floats.

When: queries carry classes: classification, intents, clustering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import log_shares
from mmembed.registry import Above0


class SupCon(Aligned):
    """Queries and positives of one class pull each other, those of other classes push.

    Args:
        temperature: 0.07 (the authors' code; 0.1 for ImageNet in the paper).
        base_temperature: the loss is scaled by temperature / base_temperature, so that the size of its gradient does
            not follow the temperature.
    """

    name = "supcon"
    least_pairs = 2

    def __init__(self, temperature: Above0 = 0.07, base_temperature: Above0 = 0.07) -> None:
        super().__init__()
        self.temperature, self.base_temperature = temperature, base_temperature

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        views = torch.stack(pairs.unit)  # (2, N, E)
        alike = (pairs.same.sum(1) - 1).float().mean()
        loss = supcon(views, pairs.same, self.temperature, self.base_temperature)
        return loss, {"others_of_the_class": alike}


def supcon(views: Tensor, alike: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """Unit vectors (V, N, E); who is of one class, (N, N) bool, or how much in [0, 1]; 1 on the diagonal -> scalar.

    >>> views = torch.eye(2).expand(2, -1, -1)
    >>> supcon(views, torch.eye(2).bool(), 1.0, 1.0)  # log(e + 2) - 1
    tensor(0.5514)
    """
    count = len(views) * views.shape[1]
    vectors = views.flatten(0, 1)  # (V N, E)
    others = ~torch.eye(count, dtype=torch.bool, device=views.device)
    weights = alike.to(views.dtype).repeat(len(views), len(views)) * others  # (V N, V N)
    shares = log_shares(vectors @ vectors.T / temperature, others)
    of_anchor = -(shares.masked_fill(weights == 0, 0) * weights).sum(1) / weights.sum(1).clamp_min(1)  # (V N,)
    return of_anchor.mean() * temperature / base_temperature
