"""DSE: a pair's score is the label's and the teacher's at once.

L_i = mean_j ( (1 - c) BCE(sigmoid(s_ij), r_ij > 0) + c (s_ij - t_ij)^2 ) over the candidates with a teacher's score

Distilled sentence embeddings (Barkan et al., arXiv 1908.05161), c = .5 there. Scores and teacher's scores are logits:
`similarity: dot, temperature: 1.0` unless a config says otherwise. With them the model needs `normalize: false`
(products of unit vectors stay within -1 and 1), and its default `normalize: true` is refused; for a teacher whose
scores are cosines write `similarity: cosine`. The paper scores a pair by a small network on [u, v, u v, |u - v|], which
no vector index can search; here a pair's score is the objective's similarity. Cost: a few passes over (Q, C).

When: a teacher's logits of pairs are there and the student's score should be a calibrated logit, not only an order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import mean


class DSE(Loss):
    """Pair-wise distillation of logits beside the binary task.

    Args:
        distillation: c, the weight of the teacher; 1 leaves the labels out.

    >>> import torch
    >>> valid, targets = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[2.0]])
    >>> DSE()(Scores(torch.zeros(1, 1), torch.ones(1, 1), valid, targets))  # (log 2 + 4) / 2
    tensor([2.3466])
    """

    name = "dse"
    reads: ClassVar[frozenset[str]] = frozenset({"score"})
    distils = "sides"
    defaults: ClassVar[Mapping[str, Any]] = {"similarity": "dot", "temperature": 1.0}

    def __init__(self, distillation: Annotated[float, Field(gt=0, le=1)] = 0.5) -> None:
        super().__init__()
        self.distillation = distillation

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a teacher's score. Raises ConfigError without any."""
        targets, known = self.taught(scores)  # (Q, C) each
        label = scores.positive.to(scores.values.dtype)
        task = functional.binary_cross_entropy_with_logits(scores.values, label, reduction="none")  # (Q, C)
        error = (scores.values - targets).square()
        return mean((1 - self.distillation) * task + self.distillation * error, known)
