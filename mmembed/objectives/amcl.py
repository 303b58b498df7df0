"""Several projection heads, with a temperature for each head and pair (AMCL, arXiv 2310.05615; experimental).

logits_ij = sum_m a_mi.b_mj / tau_mij,  L = InfoNCE(logits) + beta mean_ij sum_m ( d/2 log tau_mij + 1 / tau_mij )

a_m, b_m are unit vectors of head m, d their size; the regulariser keeps temperatures from growing. The released code
does not run and the paper leaves open how heads are joined: the sum inside the exponent is our reading. The paper's
temperature is an MLP of a pair; ours is the mean of a function of either side, tau = low + (high - low) / 2
(sigmoid(f_m(x_i)) + sigmoid(f_m(y_j))), which needs no N^2 vectors. Heads serve the training alone: what is saved and
searched is the embedding before them. Cost: (M, N, N) floats twice.

When: one similarity cannot say in what respect two things are alike; experimental.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmembed.objectives.aligned import Aligned, Pairs, drawn
from mmembed.objectives.softmax import info_nce
from mmembed.registry import Positive, Weight

LOWEST, HIGHEST = 1e-5, 2.0  # of a temperature, in the released helper; sigmoid(0) starts it near 1


class AMCL(Aligned):
    """Similarities of several learned projections, each divided by a learned temperature of the pair.

    Args:
        embedding_size: of the vectors; the model gives it.
        heads: 3 in the released code, 4 to 8 in the paper.
        head_size: of a projection.
        beta: weight of the regulariser of temperatures.
        seed: of the first values.
    """

    name = "amcl"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        embedding_size: int = 1,
        heads: Positive = 3,
        head_size: Positive = 128,
        beta: Weight = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.projections = nn.Parameter(drawn(embedding_size**-0.5, seed, heads, embedding_size, head_size))
        self.temperature_weights = nn.Parameter(drawn(embedding_size**-0.5, seed + 1, heads, embedding_size))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = pairs.unit
        size = x.shape[1]  # a prefix of the embedding under matryoshka
        projections, weights = (one[:, :size].to(x.dtype) for one in (self.projections, self.temperature_weights))
        a, b = (functional.normalize(side @ projections, dim=-1) for side in (x, y))  # (M, N, d) each
        low, high = (torch.sigmoid(weights @ side.T) for side in (x, y))  # (M, N) each
        temperatures = LOWEST + (HIGHEST - LOWEST) * (low[:, :, None] + high[:, None, :]) / 2  # (M, N, N)
        contrast, regulariser = multi_head(a, b, temperatures, pairs.same)
        metrics = {"temperature": temperatures.mean().detach(), "contrast": contrast.detach()}
        return contrast + self.beta * regulariser, metrics


def multi_head(a: Tensor, b: Tensor, temperatures: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (M, N, d) twice, (M, N, N), (N, N) bool -> contrast, regulariser.

    >>> heads = torch.eye(2).expand(2, -1, -1)
    >>> contrast, regulariser = multi_head(heads, heads, torch.ones(2, 2, 2), torch.eye(2).bool())
    >>> round(contrast.item(), 4), regulariser.item()  # two heads: log(1 + e^-2)
    (0.1269, 2.0)
    """
    logits = (a @ b.mT / temperatures).sum(0)  # (N, N)
    regulariser = a.shape[-1] / 2 * temperatures.log() + 1 / temperatures  # (M, N, N)
    return info_nce(logits, same).mean(), regulariser.sum(0).mean()
