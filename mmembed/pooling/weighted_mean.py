"""Mean with weights that grow with the position (SGPT, arXiv 2202.08904, equation 2).

Under causal attention later tokens have seen more; the i-th pooled token weighs i / sum of 1..n.

When: the backbone stays causal and is small: later tokens have seen more.
"""

import torch

from mmembed.pooling import Pooling, masked_mean


class WeightedMean(Pooling):
    name = "weighted_mean"

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return masked_mean(hidden, mask.cumsum(1) * mask)  # (B, H)
