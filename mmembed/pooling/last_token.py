"""The hidden state of the last token: the one that has seen everything under causal attention.

v = h_e,  e = max { t: m_t = 1 }

h_t (H numbers) are the states of the tokens, m_t is 1 within the pool mask. E5-mistral (arXiv 2401.00368) reads the end
token this way.

When: the backbone stays causal and is large enough to gather a meaning in its last token.
"""

import torch

from mmembed.pooling import Pooling


class LastToken(Pooling):
    """Usual for causal decoders (E5-mistral, Qwen3-Embedding). Needs a prompt that ends alike: see `append_eos`."""

    name = "last_token"

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last_places(mask)].float()  # (B, H)


def last_places(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool -> (B,) the last token within the mask of each row."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
