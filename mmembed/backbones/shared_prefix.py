"""Attention for rows that begin with the same tokens: the beginning is computed once for all of them.

Under causal attention the first P tokens of a row see nothing behind them, so rows that share these tokens share their
hidden states, keys and values in every layer. The B rows enter the backbone as one sequence of P + B * T tokens: the
prefix, then each row's own T tokens (padded on the right). Norms, projections and feed-forwards work on tokens and need
no change; `attend_behind` gives the own tokens the keys and values of the prefix and of their row. One forward of the
backbone, without a cache: gradients reach the prefix from every row, checkpointing and engines see nothing unusual.

Own tokens keep the positions that they have in their row. Cost: P + B * T tokens instead of B * (P + T) everywhere but
in attention, which copies the prefix's keys and values once a row and needs a mask of (T, P + T): forward and backward
at P = 64, B = 64, T = 32 (4 heads of 64) take 14.8 ms on one core, of B whole rows 37.3 ms (docs/log.md). On a CPU the
kernel gets grouped heads as they are, and its keys in multiples of 16.

Without gradients a prefix may also go through the backbone alone, once for several batches (`Prefix`): these are B * T
tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmembed.errors import MmembedError

UNKNOWN_TO_US = ("position_bias", "cache", "softcap", "s_aux")  # attention variants left to the stock kernel
# keys on a CPU: other counts take torch's fused bfloat16 kernel up to 1.8 times as long where there is AMX
ALIGNMENT = 16
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Prefix:
    """What batches need of a prefix that was computed before them.

    Attributes:
        attended: keys and values of each attention layer, in the order of their calls, (1, G, P, D) each.
        hidden: (P, H) last hidden states, then those of lower layers that are asked for.
    """

    attended: tuple[tuple[Tensor, Tensor], ...]
    hidden: tuple[Tensor, ...]


class SharedPrefix:
    """How one sequence is divided; goes to every attention layer as the argument `shared_prefix`.

    No dataclass: in half precision FSDP2 copies those on their way into each layer, and nobody sees the copies' calls.

    Args:
        config: of the decoder. An attention of another part of the model (a vision tower) is left alone.
        tokens: P, of the prefix.
        rows: B, behind it. 0: the sequence is the prefix alone.
        known: the prefix, where the sequence is the rows' own tokens alone.

    Attributes:
        calls: attention layers that followed it so far.
        attended: their keys and values, of a prefix alone.
    """

    def __init__(self, config: Any, tokens: int, rows: int, known: Prefix | None = None) -> None:
        self.config, self.tokens, self.rows, self.known = config, tokens, rows, known
        self.calls = 0
        self.attended: list[tuple[Tensor, Tensor]] = []
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}

    def mask(self, before: int, length: int, padding: int, window: int | None, device: torch.device) -> Tensor:
        """(T, S) bool: what `length` T tokens see of the `before` tokens in front, of themselves, of padding behind."""
        key = (before, length, padding, window)
        if key not in self._masks:
            seen = torch.ones(length, before + length + padding, dtype=torch.bool, device=device).tril(before)
            self._masks[key] = seen if window is None else seen.triu(before - window + 1)
        return self._masks[key]

    def note(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """What is kept of a layer (from 0), which has yet to attend: of a prefix alone its keys and values."""
        if not self.rows:
            self.attended.append((key, value))


def attend_behind(
    shared: SharedPrefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    kernel: Kernel,
    sliding_window: int | None = None,
    **options: Any,
) -> Tensor:
    """query (1, H, P + B * T, D), key and value (1, G, P + B * T, D) -> (1, P + B * T, H, D).

    Of a prefix alone P tokens each, behind a known one B * T.
    """
    given = [name for name in UNKNOWN_TO_US if options.get(name) is not None]
    if given:
        raise MmembedError(f"share_prefix: this backbone's attention uses {', '.join(given)}; set share_prefix: off")
    layer, shared.calls = shared.calls, shared.calls + 1
    prefix, rows = shared.tokens, shared.rows
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared.note(layer, query, key, value, scaling)
    first = prefix if shared.known is None else 0  # tokens of the sequence in front of the rows' own
    length = (query.shape[2] - first) // rows if rows else 0  # T
    window = sliding_window if sliding_window is not None and sliding_window < prefix + length else None
    parts = []
    if shared.known is None:
        first_query, first_key, first_value = (tensor[:, :, :prefix] for tensor in (query, key, value))
        mask = shared.mask(0, prefix, 0, window, query.device)
        head = kernel(first_query, first_key, first_value, mask, dropout, scaling)  # (1, H, P, D)
        parts.append(head.transpose(1, 2))
        if not rows:
            return parts[0]
    else:
        first_key, first_value = shared.known.attended[layer]

    def own(tensor: Tensor) -> Tensor:
        return tensor[0, :, first:].unflatten(1, (rows, length)).transpose(0, 1)  # (B, G, T, D)

    aligned = kernel is masked_attention and query.device.type == "cpu"
    padding = -(prefix + length) % ALIGNMENT if aligned else 0

    def behind(tensor: Tensor, before: Tensor) -> Tensor:
        whole = [before.expand(rows, -1, -1, -1), own(tensor)]
        if padding:
            whole.append(tensor.new_zeros(1).expand(rows, tensor.shape[1], padding, tensor.shape[3]))
        return torch.cat(whole, dim=2)  # (B, G, S, D), S = P + T + padding

    mask = shared.mask(prefix, length, padding, window, query.device)
    tail = kernel(own(query), behind(key, first_key), behind(value, first_value), mask, dropout, scaling)
    parts.append(tail.transpose(1, 2).reshape(1, -1, tail.shape[1], tail.shape[3]))  # of (B, H, T, D)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """query (B, H, T, D), key and value (B, G, S, D), mask (T, S) bool -> (B, H, T, D)."""
    shared = query.shape[1] // key.shape[1]
    grouped = shared > 1 and query.device.type == "cpu"  # whose fused kernel takes grouped heads: up to twice as fast
    if shared > 1 and not grouped:  # with a mask, grouped heads run in no fused kernel of a GPU
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )


def flatten(tensor: Tensor, prefix: int) -> Tensor:
    """(..., B, P + T) whose first P columns are alike -> (..., 1, P + B * T)."""
    own = tensor[..., prefix:].flatten(-2)
    return torch.cat([tensor[..., 0, :prefix], own], dim=-1).unsqueeze(-2)


def unflatten(hidden: Tensor, prefix: int, rows: int) -> tuple[Tensor, Tensor]:
    """(1, P + B * T, H) -> the prefix (P, H), and the rows' own tokens (B, T, H)."""
    return hidden[0, :prefix], hidden[0, prefix:].unflatten(0, (rows, -1))
