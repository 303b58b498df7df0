"""A mean that gives each tensor to the models that changed it most.

    w_k = |Delta_k| / sum_j |Delta_j|,   Delta_k = theta_k - theta_0,   |.| the L2 norm of the tensor

After CoDiEmb (arXiv 2508.11442), which weighs checkpoints parameter by parameter from their deviations from the start.
Its formula could not be read: this is a reading of the abstract, and another one is another file here. A tensor that
no model changed stays the start's.

When: models of different tasks (retrieval, similarity) that are to become one; `uniform` is the control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.linalg import vector_norm

from mmembed.fusion.rules import Rule


class DeltaGuided(Rule):
    """A mean that gives each tensor to the models that changed it most."""

    name = "delta_guided"
    relative = True

    def weights(self, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> list[float]:
        assert base is not None  # the rule is relative
        norms = [float(vector_norm(tensor - base)) for tensor in tensors]
        total = math.fsum(norms)
        return [norm / total if total else 1 / len(norms) for norm in norms]
