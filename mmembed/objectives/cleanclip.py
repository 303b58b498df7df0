"""Contrast between two modalities and, within each, between a content and its augmentation (CleanCLIP).

L = InfoNCE both ways(x, y) + weight / 2 ( InfoNCE(x, x') + InfoNCE(y, y') )

(arXiv 2303.03323.) The self terms have one direction, from a content to the augmentations. They break what poisoned
pairs have taught; train on clean pairs only. The augmented query x' is the second positive of a record, the augmented
positive y' its third. Cost: (N, N) floats four times.

When: pairs of the web may be poisoned and a clean set with augmentations is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import both_ways, info_nce
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Above0


class CleanCLIP(Aligned):
    """InfoNCE both ways, and of both sides with their augmentations, the second and third positive of a record.

    Args:
        temperature: 0.07 (CLIP's start; learned there: `{value: 0.07, learn: true}`).
        weight: of the self terms, 1 in the paper.
    """

    name = "cleanclip"
    least_pairs = 2
    contrasts = True
    positives_needed = 3
    by_place = True

    def __init__(self, temperature: float | Mapping[str, Any] = 0.07, weight: Above0 = 1.0) -> None:
        super().__init__()
        self.temperature, self.weight = Temperature(temperature), weight

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        cross, own = clean_terms(pairs.unit_views, pairs.same, self.temperature.scale())
        return cross + self.weight * own, {"cross_modal": cross.detach(), "in_modal": own.detach()}


def clean_terms(views: Tensor, same: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Unit vectors (4, N, E) of x, y, x', y' -> the cross-modal term, the mean of the in-modal ones.

    >>> [round(term.item(), 4) for term in clean_terms(torch.eye(2).expand(4, -1, -1), torch.eye(2).bool(), 1.0)]
    [0.3133, 0.3133]
    """
    x, y, x_augmented, y_augmented = views
    cross = both_ways(x @ y.T * scale, same).mean()
    own = [info_nce(a @ b.T * scale, same).mean() for a, b in ((x, x_augmented), (y, y_augmented))]
    return cross, torch.stack(own).mean()
