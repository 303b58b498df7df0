"""The last decoder layer for the last token of each input alone: all that last-token pooling and rerankers read.

Up to the last layer every token is needed, because later ones attend to it. In the last layer only keys and values of
all tokens are; the queries, the attention, its output projection and the feed-forward of a token are needed if that
token is read. With one token an input that layer costs two small projections: of the nano's four layers this takes off
a fifth of forward and backward, of 28 layers 3 %. Results are those of the whole layer, up to the order of sums.

A layer is known by the decoders whose layer is: a norm, attention with separate projections (heads normalised or not),
rotary positions by halves, a sum, a norm, a feed-forward, a sum. Its class becomes a subclass, which is the stock where
no forward says which tokens are last; copies and pickles are of the stock.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmembed.backbones.shared_prefix import SharedPrefix, masked_attention

# Decoders whose vectors and gradients were compared with those of whole layers (tests/equivalence/test_last_tokens.py).
KNOWN = ("qwen2", "qwen3", "llama", "mistral", "qwen3_vl_text")


class LastTokens:
    """Which token of each row is read; goes to every decoder layer as the argument `last_tokens`.

    No dataclass: in half precision FSDP2 copies those on their way into each layer.

    Args:
        places: (B,) long, in the row; of rows that share a prefix, among the row's own tokens.

    Attributes:
        calls: layers that followed it so far; 0: the hidden states are those of all tokens.
    """

    def __init__(self, places: Tensor) -> None:
        self.places, self.calls = places, 0


class LastLayer(nn.Module):
    """Stands before the class of a decoder's last layer."""

    stock: type[nn.Module]

    def forward(self, *inputs: Any, last_tokens: LastTokens | None = None, **named: Any) -> Any:
        """Hidden states (B, T, H), or (1, P + B * T, H) behind a shared prefix -> (B, 1, H) of the last tokens.

        All of them where no `last_tokens` are given, or something that is not known here.
        """
        hidden = inputs[0] if inputs else named.get("hidden_states")
        shared = named.get("shared_prefix")
        follows = (
            last_tokens is not None
            and isinstance(hidden, Tensor)
            and named.get("past_key_values") is None
            and named.get("packed_sequences") is None
            and (shared is None or shared.rows > 0)
        )
        if not follows:
            return super().forward(*inputs, **named)
        assert last_tokens is not None and hidden is not None
        last_tokens.calls += 1
        return _last(self, hidden, named["position_embeddings"], last_tokens.places, shared)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return object.__new__, (self.stock,), vars(self)


def prepare_last(decoder: Any) -> bool:
    """Lets the last layer of a decoder follow `last_tokens`, in place. Whether it can."""
    config, layers = decoder.config, list(vars(decoder)["_modules"].get("layers", ()))
    kinds = vars(config).get("layer_types")
    windowed = vars(config).get("sliding_window") is not None and (not kinds or kinds[-1] == "sliding_attention")
    if config.model_type not in KNOWN or windowed or not layers:
        return False
    layer: Any = layers[-1]
    if not isinstance(layer, LastLayer):
        stock: Any = type(layer)  # for mypy, which holds classes of modules for unhashable
        if not stock.__module__.startswith("transformers."):
            return False
        layer.__class__ = _last_class(stock)
    return True


@cache
def _last_class(stock: Any) -> type[nn.Module]:
    """A subclass of the same name, which libraries look at."""
    known = {"stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (LastLayer, stock), known)


def _last(
    layer: Any, hidden: Tensor, rotations: tuple[Tensor, Tensor], places: Tensor, shared: SharedPrefix | None
) -> Tensor:
    """hidden (B, T, H) or, shared, (1, N, H); cosines and sines (B or 1, T or N, d) -> (B, 1, H)."""
    attention, rows = layer.self_attn, len(places)
    start = 0 if shared is None or shared.known is not None else shared.tokens  # tokens in front of the rows' own
    normed = layer.input_layernorm(hidden)

    def own(tensor: Tensor) -> Tensor:
        """(B, T, ...) of the rows' own tokens."""
        return tensor if shared is None else tensor[0, start:].unflatten(0, (rows, -1))

    def last(tensor: Tensor) -> Tensor:
        """(B, 1, ...)."""
        whole = own(tensor)
        return whole[torch.arange(rows, device=places.device) % len(whole), places].unsqueeze(1)

    cos, sin = rotations
    query = _rotated(_heads(attention, "q", last(normed)), last(cos), last(sin))  # (B, 1, h, d)
    key = _rotated(_heads(attention, "k", normed), cos, sin)  # (B, T, G, d) or (1, N, G, d)
    value = _heads(attention, "v", normed)
    before = 0
    if shared is None:
        keys, values = key.transpose(1, 2), value.transpose(1, 2)  # (B, G, T, d)
    else:
        before, number, shared.calls = shared.tokens, shared.calls, shared.calls + 1
        heads = [one[:, :start].transpose(1, 2) for one in (key, value)]  # (1, G, P, d)
        if shared.known is not None:
            heads = list(shared.known.attended[number])
        keys, values = (
            torch.cat([head.expand(rows, -1, -1, -1), own(one).transpose(1, 2)], dim=2)
            for head, one in zip(heads, (key, value), strict=True)
        )
    seen = torch.arange(keys.shape[2], device=places.device) <= before + places[:, None]  # (B, S)
    dropout = attention.attention_dropout if layer.training else 0.0
    mixed = masked_attention(query.transpose(1, 2), keys, values, seen[:, None, None], dropout, attention.scaling)
    summed = last(hidden) + attention.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, 1, H)
    output: Tensor = summed + layer.mlp(layer.post_attention_layernorm(summed))
    return output


def _heads(attention: Any, name: str, normed: Tensor) -> Tensor:
    """(..., H) -> (..., heads, d), normalised where the attention does that."""
    parts = attention._modules
    heads: Tensor = parts[f"{name}_proj"](normed).unflatten(-1, (-1, attention.head_dim))
    return parts[f"{name}_norm"](heads) if f"{name}_norm" in parts else heads


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads (B, T, h, d), cosines and sines (B or 1, T, d), whose halves are alike."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-high, low], dim=-1) * sin
