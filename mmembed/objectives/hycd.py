"""Hybrid contrastive distillation: the target is between the pair itself and what a teacher sees (HyCD of CLIP-Refine).

L = mean over both directions and i of KL( alpha onehot_i + (1 - alpha) softmax(t_i / T) || softmax(x_i.y / T) ),

with the teacher's similarities t_i (arXiv 2504.12717). Raw cosines, without CLIP's scale, as in the released code.
Pairs of one content are left out of both softmaxes. The teacher is the frozen model that training starts from
(`momentum: 1`); its weights below 1 follow the student's; with null there is no second model, and the student's own
similarities without a gradient take its place: the same in the first step, then nothing is preserved that the other
terms take away. Cost: (N, N) floats four times, and the teacher's (`mmembed.training.teacher`).

When: beside `rafa`, or alone where a fine-tuning must not forget how it ranked before.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Momentum, Pairs
from mmembed.objectives.softmax import log_shares
from mmembed.registry import Above0


class HyCD(Aligned):
    """Distillation of a teacher's similarities, mixed with which pairs belong together.

    Args:
        alpha: share of the pair itself in the target; 0.5 in the paper.
        temperature: of both softmaxes; 1 in the paper.
        momentum: of the teacher. 1, the frozen start, in the paper; null: the model itself without a gradient.
    """

    name = "hycd"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        temperature: Above0 = 1.0,
        momentum: Momentum | None = 1.0,
    ) -> None:
        super().__init__()
        self.alpha, self.temperature, self.momentum = alpha, temperature, momentum

    @property
    def teacher_momentum(self) -> float | None:
        return self.momentum

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        theirs = torch.stack([queries, positives]).detach() if pairs.taught is None else pairs.taught.unit_views
        teacher = theirs[0] @ theirs[1].T  # (N, N)
        return distillation(queries @ positives.T, teacher, pairs.same, self.alpha, self.temperature), {}


def distillation(scores: Tensor, teacher: Tensor, same: Tensor, alpha: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(N, N) similarities of student and teacher, (N, N) bool -> scalar.

    >>> distillation(torch.eye(2), torch.eye(2), torch.eye(2).bool(), alpha=0.0)
    tensor(0.)
    """
    itself = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    directions = []
    for ours, theirs, alike in ((scores, teacher, same), (scores.T, teacher.T, same.T)):
        valid = ~alike | itself.bool()
        target = alpha * itself + (1 - alpha) * log_shares(theirs / temperature, valid).exp()
        shares = log_shares(ours / temperature, valid)
        directions.append((torch.special.xlogy(target, target) - target * shares).sum(1).mean())
    return torch.stack(directions).mean()
