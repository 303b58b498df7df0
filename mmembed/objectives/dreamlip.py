"""Several captions of a picture, all of them positives (the global term of DreamLIP, arXiv 2403.17007).

L = 1 / (2 K) ( mean_i sum_k -log softmax(x_i . captions)_{ik} + mean_{ik} -log softmax(c_ik . queries)_i )

Every caption stays in the denominator of a query, its own others too; the target row sums to K, so the first term is a
sum over captions and no mean, as in the authors' code. The captions are the positives of a record in order. The term
that groups sub-captions with patches of the picture needs patch weights, which one vector an input has not. Cost:
(N, N K) floats twice.

When: a picture has several captions, sentences of a long one for example, and all of them are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import info_nce, log_shares
from mmembed.objectives.temperature import Temperature


class DreamLIP(Aligned):
    """Each of the first positives of a record is a target of its query, and the query of each.

    Args:
        temperature: 0.07 (CLIP's start; learned there: `{value: 0.07, learn: true}`).
        captions: positives a query; 8 to 10 sub-captions in the paper.
    """

    name = "dreamlip"
    least_pairs = 2
    contrasts = True

    def __init__(
        self, temperature: float | Mapping[str, Any] = 0.07, captions: Annotated[int, Field(ge=1)] = 2
    ) -> None:
        super().__init__()
        self.temperature, self.positives_needed = Temperature(temperature), captions

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, *captions = pairs.unit_views
        return multi_caption(queries, torch.stack(captions, dim=1), pairs.same, self.temperature.scale()), {}


def multi_caption(queries: Tensor, captions: Tensor, same: Tensor, scale: Tensor | float) -> Tensor:
    """Unit vectors (N, E) and (N, K, E), (N, N) bool -> scalar.

    >>> multi_caption(torch.eye(2), torch.eye(2).unsqueeze(1), torch.eye(2).bool(), 1.0)
    tensor(0.3133)
    """
    count, several = captions.shape[:2]
    scores = queries @ captions.flatten(0, 1).T * scale  # (N, N K)
    own = torch.eye(count, dtype=torch.bool, device=queries.device).repeat_interleave(several, dim=1)
    shares = log_shares(scores, own | ~same.repeat_interleave(several, dim=1))
    to_captions = -shares[own].sum() / count
    of_caption = scores.T.unflatten(0, (count, several)).transpose(0, 1)  # (K, N, N)
    to_queries = torch.stack([info_nce(one, same.T) for one in of_caption]).mean()
    return (to_captions + to_queries) / (2 * several)
