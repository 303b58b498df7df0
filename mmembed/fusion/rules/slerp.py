"""Two models, fused along the arc between them instead of the chord.

    cos(phi) = <a, b> / (|a| |b|)        of the whole tensor
    w = sin((1 - t) phi) / sin(phi),  sin(t phi) / sin(phi);      1 - t, t where |cos(phi)| > 0.9995

Spherical interpolation (Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985), with mergekit's bound for
vectors so alike that the arc is the chord. Models of one start mostly are: there it equals `linear`.

When: two models that moved far apart, whose mean would be shorter than both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm

from mmembed.fusion.rules import Rule

ALIKE = 0.9995  # mergekit's DOT_THRESHOLD


class Slerp(Rule):
    """Two models, fused along the arc between them.

    Args:
        t: from 0, the first model, to 1, the second.
    """

    name = "slerp"
    least = most = 2

    def __init__(self, t: Annotated[float, Field(ge=0, le=1)] = 0.5) -> None:
        self.t = t

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        first, second = (tensor.flatten() for tensor in tensors)  # (N,) each
        lengths = float(vector_norm(first)) * float(vector_norm(second))
        cosine = float(first @ second) / lengths if lengths else 1.0
        if abs(cosine) > ALIKE:
            return [1 - self.t, self.t]
        angle = math.acos(cosine)
        return [math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)]
