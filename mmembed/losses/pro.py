"""PRO: each candidate of a row above those of lower gold, the further apart in gold the more.

L = mean_k -log( e^{w_k s_k} / (e^{w_k s_k} + sum_j e^{w_j s_j}) ),    w_j = y_k - y_j,  w_k = max_j w_j

Over the anchors k that have candidates j of strictly lower gold, with s the similarity / temperature: CoDiEmb (arXiv
2508.11442), after preference ranking optimisation (arXiv 2306.17492). Cost: (Q, C, C) floats, so it is meant for one
row of pairs.

When: pairs carry a similarity and only their order counts; beside `pearson`, which sees the whole.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores


class PRO(Loss):
    """Each graded pair above those of lower gold, the further apart in gold the more.

    A row without two different golds gives 0.

    >>> values, gold = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(PRO()(Scores(values, gold, torch.ones(1, 2, dtype=torch.bool))).item(), 6)  # one anchor: log 2
    0.693147
    """

    name = "pro"
    reads: ClassVar[frozenset[str]] = frozenset({"relevance"})
    objective = "pairs"
    needs_grades = True

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses."""
        floor = torch.finfo(scores.values.dtype).min / 2  # not -inf: an anchor without lower ones must give 0, not NaN
        values = scores.values.masked_fill(~scores.valid, 0.0)  # (Q, C)
        gold = scores.relevance.to(values.dtype)
        gap = gold[:, :, None] - gold[:, None, :]  # (Q, anchors, others)
        lower = (gap > 0) & scores.valid[:, :, None] & scores.valid[:, None, :]
        gap = gap.masked_fill(~lower, 0.0)
        others = (gap * values[:, None, :]).masked_fill(~lower, floor).logsumexp(2)  # (Q, C)
        # -log(e^a / (e^a + e^b)) = softplus(b - a)
        losses = functional.softplus(others - gap.amax(2) * values)  # (Q, C)
        anchors = lower.any(2)
        return losses.masked_fill(~anchors, 0.0).sum(1) / anchors.sum(1).clamp_min(1)
