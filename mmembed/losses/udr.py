"""UDR: candidates in the order of a language model's feedback.

L_i = f mean_{(a, b): t_a > t_b} w_ab log(1 + exp(s_b - s_a)) + InfoNCE with the candidate of the highest t as positive
w_ab = |1 / rank(a) - 1 / rank(b)|, ranks of the current scores among the query's scored candidates

Li et al. (arXiv 2305.04320): the language model scores how much each candidate helps, `score` here; a pair weighs more
where exchanging it moves something at the top (LambdaRank). Ranks are whole numbers, so weights have no gradient. The
InfoNCE part has all valid candidates as negatives, the query's own too. The released code averages over the pairs of
the whole batch; here over those of the query, so that its loss does not depend on its neighbours: equal where all
queries have as many. Its scores are dot products without a temperature, which is `similarity: dot, temperature: 1.0`
and the model's `normalize: false`; the default here is that of `contrastive`, cosines at .05. Cost: (Q, K, K) pairs of
the K scored candidates, and one logsumexp over (Q, C).

When: documents carry a language model's feedback (how much an example helps it) and retrieval is for prompts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.losses import Loss, Scores
from mmembed.losses.rows import logsumexp, mean
from mmembed.registry import Weight


class UDR(Loss):
    """List-wise on a language model's feedback, beside in-batch InfoNCE.

    Args:
        list_weight: f (4 in the paper's code).

    >>> valid, targets = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 1.0]])
    >>> UDR()(Scores(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), valid, targets))  # 4 (1 - 1/2) log 2 + log 2
    tensor([2.0794])
    """

    name = "udr"
    reads: ClassVar[frozenset[str]] = frozenset({"score"})
    distils = "list"

    def __init__(self, list_weight: Weight = 4.0) -> None:
        super().__init__()
        self.list_weight = list_weight

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,) losses, 0 for a row without a teacher's score. Raises ConfigError without any."""
        targets, known = self.taught(scores)  # (Q, C) each
        longest = max(1, int(known.sum(1).max())) if known.numel() else 1  # K
        ranked, columns = targets.masked_fill(~known, float("-inf")).topk(min(longest, targets.shape[1]), dim=1)
        there = known.gather(1, columns)  # (Q, K), in the teacher's order
        values = scores.values.gather(1, columns)  # (Q, K)
        best = there & (ranked == ranked[:, :1])  # (Q, K), more than one where the teacher gives equal scores
        in_batch = logsumexp(scores.values, scores.valid) - mean(values, best)  # (Q,)
        losses = self.list_weight * _pairs(values, ranked, there) + in_batch
        return losses.masked_fill(~there[:, 0], 0.0)


def _pairs(values: Tensor, targets: Tensor, there: Tensor) -> Tensor:
    """(Q, K) scores, teacher's scores and which exist -> (Q,) mean over ordered pairs; 0 without one."""
    count = values.shape[1]
    first = torch.ones(count, count, dtype=torch.bool, device=values.device).tril(-1)  # (a, b): equals stay in order
    ahead = (values[:, None, :] > values[:, :, None]) | ((values[:, None, :] == values[:, :, None]) & first)
    ahead &= there[:, None, :]  # (Q, a, b): b is ranked above a
    gain = 1 / (1 + ahead.sum(2).to(values.dtype))  # (Q, K), 1 / rank
    better = (targets[:, :, None] > targets[:, None, :]) & there[:, :, None] & there[:, None, :]  # (Q, a, b)
    weights = (gain[:, :, None] - gain[:, None, :]).abs() * better
    losses = functional.softplus(values[:, None, :] - values[:, :, None])  # (Q, a, b)
    return (weights * losses).sum((1, 2)) / better.sum((1, 2)).clamp_min(1)
