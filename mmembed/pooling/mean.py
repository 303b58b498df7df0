"""Mean over the tokens of the pool mask.

v = sum_t m_t h_t / sum_t m_t

h_t (H numbers) are the states of the tokens, m_t is 1 within the pool mask. Sentence-BERT's default (arXiv 1908.10084).

When: the backbone is bidirectional, or small. The default.
"""

import torch

from mmembed.pooling import Pooling, masked_mean


class Mean(Pooling):
    """The usual choice for bidirectional backbones and for small causal ones."""

    name = "mean"

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return masked_mean(hidden, mask)  # (B, H)
