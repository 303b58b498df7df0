"""Latent attention (NV-Embed, arXiv 2405.17428): tokens attend to a trained array of latents, then the mean of tokens.

Two variants, because the paper's equation and the released model are different functions of the states h (T, H) and
the trained latents l (R, H); the mean is over the pool mask. `released`, the authors' modelling file, with several
heads of d numbers, each LN with weights of its own, and biases (not written) in the feed-forward alone:

a = h + softmax( LN(h) W_q (LN(l) W_k)^T / sqrt(d) ) LN(l) W_v W_o
v = mean_t ( a + (x W_1 * gelu(x W_2)) W_3 )_t,  x = LN(a)

`printed`, section 3.1, equations 1 and 2: one head, neither scale nor projection:

v = mean_t ( gelu(O W_1) W_2 )_t,  O = softmax(h l^T) l

Cost a token: `num_heads * dim_head * (2 * hidden + 2 * num_latents)` multiply-adds for the attention, and as much as a
decoder layer's feed-forward.

When: the backbone is bidirectional and data suffice to train a block of its own (NV-Embed's hundreds of sets).
"""

from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from mmembed.errors import ConfigError
from mmembed.pooling import Pooling, masked_mean
from mmembed.registry import Positive


class LatentAttention(Pooling):
    """NV-Embed's pooling; the latents start as N(0, 1), trained in full beside LoRA.

    Args:
        num_latents: rows of the latent array (512 in the paper).
        num_heads: attention heads of the released block. None is 8, as in the paper.
        dim_head: width of a head. None is hidden_size / num_heads, enough for small backbones; NV-Embed has 4096.
        feed_forward_multiplier: inner width of the feed-forward over hidden_size (4).
        variant: `released` or `printed`, which has one head of the hidden size and refuses the two options of heads.
    """

    name = "latent_attention"
    unset: ClassVar[dict[str, int]] = {"num_heads": 8}

    def __init__(
        self,
        hidden_size: int,
        num_latents: Positive = 512,
        num_heads: Positive | None = None,
        dim_head: Positive | None = None,
        feed_forward_multiplier: Positive = 4,
        variant: Literal["released", "printed"] = "released",
    ) -> None:
        super().__init__(hidden_size)
        if variant not in ("released", "printed"):
            raise ConfigError(f"pooling.latent_attention: there is no variant '{variant}'; use 'released' or 'printed'")
        for option, value in (("num_heads", num_heads), ("dim_head", dim_head)):
            if variant == "printed" and value is not None:
                raise ConfigError(
                    f"pooling.latent_attention.{option}: {value} has no effect with variant 'printed', which has one "
                    "head without projections; remove it, or use 'released'"
                )
        num_heads = self.unset["num_heads"] if num_heads is None else num_heads
        self.variant, self.num_heads = variant, num_heads
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))  # (R, H)
        inner = hidden_size * feed_forward_multiplier
        if variant == "printed":
            self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))
            return
        width = num_heads * (dim_head if dim_head is not None else max(1, hidden_size // num_heads))
        self.norm_tokens, self.norm_latents = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.norm_feed_forward = nn.LayerNorm(hidden_size)
        self.to_query = nn.Linear(hidden_size, width, bias=False)
        self.to_key_value = nn.Linear(hidden_size, 2 * width, bias=False)
        self.to_output = nn.Linear(width, hidden_size, bias=False)
        self.feed_forward_in = nn.Linear(hidden_size, 2 * inner)
        self.feed_forward_out = nn.Linear(inner, hidden_size)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = hidden.to(self.latents.dtype)  # (B, T, H)
        block = self._released if self.variant == "released" else self._printed
        return masked_mean(block(tokens), mask)  # (B, H)

    def _released(self, tokens: torch.Tensor) -> torch.Tensor:
        attended = self._attend(self.norm_tokens(tokens), self.norm_latents(self.latents)) + tokens  # (B, T, H)
        value, gate = self.feed_forward_in(self.norm_feed_forward(attended)).chunk(2, dim=-1)  # (B, T, inner) each
        return self.feed_forward_out(value * F.gelu(gate)) + attended

    def _attend(self, tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape[:2]
        query = self.to_query(tokens).view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, heads, T, dh)
        key, value = (
            half.view(1, len(latents), self.num_heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
            for half in self.to_key_value(latents).chunk(2, dim=-1)
        )  # (B, heads, R, dh)
        mixed = F.scaled_dot_product_attention(query, key, value)  # scale dh**-0.5, no mask on the latents
        return self.to_output(mixed.transpose(1, 2).reshape(batch, length, -1))  # (B, T, H)

    def _printed(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = (tokens @ self.latents.T).softmax(-1)  # (B, T, R)
        return self.mlp(weights @ self.latents)  # (B, T, H)
