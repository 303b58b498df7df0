"""One vector a token, for late interaction (FILIP, arXiv 2111.07783; ColBERT, 2004.12832; ColPali, 2407.01449).

v_t = W h_t for each token t of the pool mask,  W (dim, H) learned

The vectors are normalised one by one by the model and compared by the objective's `maxsim`; the pool mask goes with
them, so padding and instruction tokens never match anything.

When: quality matters more than the size of the index: late interaction over tokens and patches.
"""

import torch
from torch import nn

from mmembed.pooling import Pooling
from mmembed.registry import Positive


class MultiVector(Pooling):
    """Keeps a vector for every token of the pool mask.

    Args:
        dim: size of a vector (128 in ColBERT and ColPali), through a linear map without bias; None keeps hidden_size.
    """

    name = "multi_vector"
    multi_vector = True

    def __init__(self, hidden_size: int, dim: Positive | None = 128) -> None:
        super().__init__(hidden_size if dim is None else dim)
        self.map = None if dim is None else nn.Linear(hidden_size, dim, bias=False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors = hidden.float() if self.map is None else self.map(hidden.to(self.map.weight.dtype)).float()
        return vectors * mask.unsqueeze(-1)  # (B, T, E)
