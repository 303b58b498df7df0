"""Mean with weights that grow with the position (SGPT, arXiv 2202.08904, equation 2).

v = sum_i w_i h_i,  w_i = i / (1 + 2 + ... + n)

over the n tokens of the pool mask in their order: under causal attention later ones have seen more.

When: the backbone stays causal and is small: later tokens have seen more.
"""

import torch

from mmembed.pooling import Pooling, masked_mean


class WeightedMean(Pooling):
    name = "weighted_mean"

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return masked_mean(hidden, mask.cumsum(1) * mask)  # (B, H)
