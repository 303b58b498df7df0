"""Attention without padding: the B sequences of a chunk stand one behind the other in a single row of N tokens.

Norms, projections and feed-forwards work on tokens, so padding costs there what tokens cost; packed, there is none.
Positions begin at 0 for each sequence, and `attend_packed` lets a token see its own sequence only. On CUDA in half
precision that is FlashAttention's kernel for sequences of different lengths (arXiv 2307.08691), part of torch:
no mask is made, neither for a causal backbone nor for a bidirectional one, whose padded batches need one and run no
FlashAttention. Anywhere else the sequences are computed one by one: exact, and slow where there are many.

The last hidden states return to rows with padding (zeros, outside of the pool mask), which costs one copy.
"""

from __future__ import annotations

import inspect
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmembed.backbones.shared_prefix import UNKNOWN_TO_US, masked_attention
from mmembed.errors import MmembedError

AttentionKernel = Literal["auto", "padded", "packed"]
ATTENTION_KERNELS: tuple[AttentionKernel, ...] = ("auto", "padded", "packed")
HALF = (torch.bfloat16, torch.float16)
# Decoders whose packed vectors and gradients were compared with padded ones (tests/equivalence/test_packed.py).
KNOWN_DECODERS = (
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma3_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
)
WIDEST_HEAD, WIDEST_HEAD_ANYWHERE = 256, 192  # of the kernel; gradients of heads above 192 need a data-centre GPU
DATA_CENTRE = ((8, 0), (9, 0), (10, 0))  # compute capabilities


class Packed:
    """How one row is divided into sequences; goes to every attention layer as the argument `packed_sequences`.

    No dataclass: in half precision FSDP2 copies those on their way into each layer, and nobody sees the copies' calls.

    Args:
        config: of the decoder. An attention of another part of the model is left alone.
        lengths: tokens of each of the B sequences; they sum up to N.
        causal: whether a token sees nothing behind it.
        device: where the row is.

    Attributes:
        calls: attention layers that followed it so far.
    """

    def __init__(self, config: Any, lengths: tuple[int, ...], causal: bool, device: torch.device) -> None:
        self.config, self.lengths, self.causal, self.device = config, lengths, causal, device
        self.calls = 0

    @cached_property
    def starts(self) -> Tensor:
        """(B + 1,) int32: where each sequence begins, and N."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def sequence(self) -> Tensor:
        """(N,) the sequence that each token is of. Sizes are known here, so a GPU is not waited for."""
        lengths = torch.tensor(self.lengths).to(self.device, non_blocking=True)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """(N,) the place of each token in its sequence."""
        return torch.arange(sum(self.lengths), device=self.device) - self.starts[self.sequence]

    @cached_property
    def places(self) -> Tensor:
        """(N,) the place of each token among the B * T of the right-padded rows, one row behind the other."""
        return self.sequence * max(self.lengths) + self.positions

    def pack(self, ids: Tensor) -> Tensor:
        """(B, T) -> (1, N)."""
        return ids.flatten()[self.places].unsqueeze(0)

    def unpack(self, hidden: Tensor) -> Tensor:
        """(1, N, H) -> (B, T, H), zeros where the padding is."""
        rows, width = len(self.lengths), hidden.shape[-1]
        padded = hidden.new_zeros(rows * max(self.lengths), width).index_copy(0, self.places, hidden[0])
        return padded.view(rows, -1, width)


def unknown(config: Any, causal: bool) -> str | None:
    """Why a decoder is not known to give packed sequences the vectors of padded ones; None where it does.

    Args:
        config: of the decoder.
    """
    settings = vars(config)
    if config.model_type not in KNOWN_DECODERS:
        return f"the decoder '{config.model_type}' has not been compared packed and padded"
    if settings.get("attention_dropout"):
        return "the backbone has attention_dropout, which the kernel lacks"
    windows = settings.get("sliding_window") is not None or "sliding_attention" in (settings.get("layer_types") or ())
    if windows and not causal:
        return "attention is bidirectional with sliding windows"
    return None


def no_kernel(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for packed sequences; None where there is.

    Args:
        config: of the decoder.
        dtype: that attention computes in.
    """
    if dtype not in HALF:
        return f"attention computes in {str(dtype).removeprefix('torch.')}; the kernel takes bfloat16 and float16"
    width = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    return _no_kernel(device, width)


@lru_cache
def _no_kernel(device: torch.device, width: int) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return f"no kernel for device '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    widest = WIDEST_HEAD if capability in DATA_CENTRE else WIDEST_HEAD_ANYWHERE
    if capability < (8, 0):
        return f"no kernel for compute capability {capability[0]}.{capability[1]}"
    return f"no kernel for heads of {width}" if width > widest or width % 8 else None


def attend_packed(
    packed: Packed,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None = None,
    **options: Any,
) -> Tensor:
    """query (1, H, N, D), key and value (1, G, N, D) -> (1, N, H, D)."""
    given = [name for name in UNKNOWN_TO_US if options.get(name) is not None] + ["dropout"] * (dropout > 0)
    if given:
        raise MmembedError(f"attention_kernel: this backbone's attention uses {', '.join(given)}; set it to padded")
    packed.calls += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < max(packed.lengths) else None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms and rotations leave float32
    if value.dtype in HALF and _no_kernel(value.device, value.shape[-1]) is None:
        return _fused(packed, query, key, value, scaling, window)
    return _one_by_one(packed, query, key, value, scaling, window)


def _fused(packed: Packed, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packed.lengths)
    seen = (-1 if window is None else window - 1, 0) if packed.causal else (-1, -1)  # tokens before and behind
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, H or G, D)
    lengths = (packed.starts, packed.starts, longest, longest)
    options: dict[str, Any] = {"scale": scaling, "window_size": seen, **_grouped_heads()}
    mixed = cast("Tensor", varlen_attn(query, key, value, *lengths, **options))  # (N, H, D)
    return mixed.unsqueeze(0)


@lru_cache
def _grouped_heads() -> dict[str, Any]:
    """torch 2.11 shares key heads unasked; later ones have to be asked."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _one_by_one(
    packed: Packed, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        if window is None or length <= window:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=packed.causal, scale=scaling, enable_gqa=True
            )
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        return masked_attention(query, key, value, mask, 0.0, scaling)

    parts = zip(*(tensor.split(packed.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=2).transpose(1, 2)
