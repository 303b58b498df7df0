"""Contrast with learned prototypes in the place of other samples: SwAV's swapped codes, MLCD's several labels.

Each side of a pair is scored against K prototypes c (unit vectors, learned). Codes of a side, without gradient, are the
scores made a balanced assignment by Sinkhorn's iterations: every prototype gets the same share of the batch, so that
not all samples fall into one. The code of one side is the target of the other. With target `swapped` (SwAV, arXiv
2006.09882):

L = -1/2 sum over sides of mean_i sum_k code_ik log softmax_k(z_i.c / tau)

With `multi_label`:

L = 1/2 sum over sides of mean_i [ log(1 + sum_{k in neg} e^{z_i.c_k / tau})
                                   + log(1 + sum_{k in pos} e^{-z_i.c_k / tau}) ]

where pos are the `labels` largest of the other side's code (the loss of MLCD on SwAV's codes, a mix of ours).

Codes come from the batch, which needs no pass over the data but sees no more than it: `mlcd` has the labels of a
clustering of all data, `proto_clip` the prototypes of an episode. A batch smaller than K leaves prototypes without a
sample: SwAV then adds a queue, here choose K below the global batch. Prototypes serve the training
alone. No negatives are compared, so false ones do not exist, and any source will do. Cost: (N, K) floats, 2 x
`iterations` times.

When: samples have meanings in common and no labels: clusters instead of false negatives.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, drawn
from mmembed.registry import Above0, Positive

LABELS = 8


class Prototypes(Aligned):
    """The balanced assignment of one side to learned prototypes is what the other side has to predict.

    Args:
        embedding_size: of the vectors; the model gives it.
        prototypes: their number K; 3,000 in SwAV for batches of 4,096.
        target: `swapped` (soft codes) or `multi_label` (the largest of a code).
        labels: prototypes that a sample belongs to with `multi_label` (default 8), and not without.
        temperature: 0.1, of SwAV.
        sharpness: Sinkhorn's epsilon, 0.05 in SwAV; smaller codes are harder.
        iterations: of Sinkhorn, 3 in SwAV.
        seed: of the first prototypes.
    """

    name = "prototypes"
    least_pairs = 2

    def __init__(
        self,
        embedding_size: int = 1,
        prototypes: Annotated[int, Field(ge=2)] = 64,
        target: Literal["swapped", "multi_label"] = "swapped",
        labels: Positive | None = None,
        temperature: Above0 = 0.1,
        sharpness: Above0 = 0.05,
        iterations: Positive = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if labels is not None and target == "swapped":
            raise ConfigError(
                f"objectives.prototypes.labels: {labels} has no effect with target 'swapped', which predicts whole "
                "codes; remove it, or set target: multi_label"
            )
        self.labels = LABELS if labels is None else labels
        if target == "multi_label" and self.labels >= prototypes:
            raise ConfigError(f"objectives.prototypes.labels: {self.labels} of {prototypes} prototypes; give fewer")
        self.target, self.temperature = target, temperature
        self.sharpness, self.iterations = sharpness, iterations
        self.prototypes = nn.Parameter(drawn(embedding_size**-0.5, seed, prototypes, embedding_size))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        prototypes = self.prototypes[:, : pairs.queries.shape[1]].to(pairs.queries.dtype)
        centres = functional.normalize(prototypes, dim=-1)  # (K, E)
        scores = [side @ centres.T for side in pairs.unit]  # (N, K) each
        codes = [balanced(one.detach() / self.sharpness, self.iterations) for one in scores]
        terms = []
        for own, code in zip(scores, reversed(codes), strict=True):
            if self.target == "swapped":
                terms.append(-(code * (own / self.temperature).log_softmax(1)).sum(1).mean())
            else:
                positive = torch.zeros_like(code, dtype=torch.bool).scatter(1, code.topk(self.labels, 1).indices, True)
                terms.append(discrimination(own / self.temperature, positive).mean())
        used = torch.special.entr(codes[0].mean(0)).sum().exp()  # of K
        return torch.stack(terms).mean(), {"prototypes_used": used}


@torch.no_grad()
def balanced(scores: Tensor, iterations: int = 3) -> Tensor:
    """(N, K) scores -> (N, K) codes: rows sum to 1, columns to about N / K (Sinkhorn-Knopp, in logarithms).

    >>> balanced(torch.tensor([[3.0, 0.0], [2.0, 0.0]]), iterations=50).sum(0).tolist()  # both prefer the first
    [1.0, 1.0]
    """
    logs = scores
    for _ in range(iterations):
        logs = logs - logs.logsumexp(0, keepdim=True) - math.log(logs.shape[1])
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


def discrimination(scores: Tensor, positive: Tensor) -> Tensor:
    """MLCD's loss: positives above 0, others below, in two terms that do not compete.

    (N, K) scores, (N, K) bool -> (N,).

    >>> discrimination(torch.zeros(1, 3), torch.tensor([[True, False, False]]))  # log 2 + log 3
    tensor([1.7918])
    """
    floor = torch.finfo(scores.dtype).min / 2
    push = functional.pad(scores.masked_fill(positive, floor), (1, 0)).logsumexp(1)
    pull = functional.pad((-scores).masked_fill(~positive, floor), (1, 0)).logsumexp(1)
    return push + pull
