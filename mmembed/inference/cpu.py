"""Faster kernels for inference on CPUs, with the same weights and results.

Places where the stock kernels leave most of a processor unused (one core of an AMD EPYC with AVX-512):

* float32 `nn.Linear` calls MKL, which runs 105 GFLOP/s on AMD processors; oneDNN, also inside torch, runs 245.
* bfloat16 attention: the fused kernel takes 6.6 ms for 2 sequences of 512 tokens and 4 heads of 64, and 0.67 ms for
  64 sequences of 16; products over blocks of queries take 2.2 and 0.42 ms: they use the bfloat16 instructions.
* `nn.Conv3d` over patches as large as its kernel (the Qwen-VL families) is a product of matrices, but runs as a
  convolution: 1.1 ms an image of 96 patches, 0.15 ms as a product. A quarter of the time of a small vision tower.

With AMX (one core of an Intel Xeon) torch's fused bfloat16 attention uses the matrix units and is faster than blocks of
products: 1.8 against 3.3 ms for 2,048 tokens in rows of 256. But it is slow with keys that are no multiple of 16: rows
of 177 take 3.2 ms, and 2.0 with 15 keys more that nobody sees. Norms and rotary positions: see
`mmembed.inference.elementwise`; what a whole decoder layer saves: `mmembed.inference.decoder`.

They act only where no gradient is needed and fall back to the stock kernel everywhere else, so that a model prepared
here can still be trained, moved to another device and saved. Differences: float32 rounding (1e-6), one
bfloat16 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmembed.backbones import attention as attending
from mmembed.backbones import shared_prefix as sharing
from mmembed.backbones.patch_conv import PatchConv3d
from mmembed.inference.decoder import fuse_layers
from mmembed.inference.elementwise import ATTENTION, accelerate_elementwise

QUERY_BLOCK = (
    64  # rows of the score matrix made at a time: half of a causal matrix is skipped, scores stay in the cache
)
WHOLE_BLOCK = 512  # the same without a causal mask, where nothing can be skipped
ALIGNED_FROM = 64  # keys; of shorter rows the copy takes longer than what it saves
STOCK_BLOCK = 64  # queries of the stock kernel in float32; 32 and 96 are within 5 %, 192 takes 10 to 20 % longer
BLOCKS_FROM = 96  # queries: of 64 a block is the whole


def accelerate(model: nn.Module) -> None:
    """Prepares a model in place; call it again after adapters were added. Weights, names and types stay.

    Args:
        model: the backbone, wrapped by peft or not.
    """
    cpu = cpu_capabilities() if torch.backends.mkldnn.is_available() else {}
    accelerate_elementwise(model, fused=bool(cpu.get("amx_bf16")))
    if not torch.backends.mkldnn.is_available():
        return
    better: dict[type[nn.Module], type[nn.Module]] = {nn.Conv3d: OneDnnPatches, PatchConv3d: OneDnnPatches}
    if "AMD" in cpu.get("cpu_name", ""):
        better[nn.Linear] = OneDnnLinear
    for module in model.modules():
        if type(module) in better:  # changing the class keeps the parameters, and every reference to the module
            module.__class__ = better[type(module)]
    if cpu.get("amx_bf16"):  # the stock kernel has matrix units of its own, if its keys are aligned
        _use_attention(model, attend_aligned)
        fuse_layers(model)
    elif cpu.get("avx512_bf16"):
        _use_attention(model, attend)
    else:
        _use_attention(model, attend_in_blocks)


def cpu_capabilities() -> Mapping[str, Any]:
    """What this processor can do, as torch sees it; empty where torch is too old to say."""
    return torch.cpu.get_capabilities() if "get_capabilities" in vars(torch.cpu) else {}


class OneDnnLinear(nn.Linear):
    """nn.Linear whose float32 product without gradients runs in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _onednn_linear(input, self.weight, self.bias)


class OneDnnPatches(PatchConv3d):
    """`PatchConv3d` whose product without gradients runs in oneDNN.

    Frames that are one memory (`mmembed.backbones.patches`) are multiplied once, by the sum of their weights.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *kernel_size) -> (N, out_channels, 1, 1, 1); any other input as nn.Conv3d."""
        if not self.takes_one_patch(input) or torch.is_grad_enabled():
            return super().forward(input)
        weight = self.weight
        if input.shape[2] > 1 and input.stride(2) == 0:
            input, weight = input[:, :, 0], weight.sum(2)
        return _onednn_linear(input.flatten(1), weight.flatten(1), self.bias)[:, :, None, None, None]


def _onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu" or not input.numel():
        return F.linear(input, weight, bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers: query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, D)."""
    fast = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled()
    if not (fast and _is_plain(module, query, key, attention_mask, options)):
        if fast and options.get("sliding_window") is None:
            options["prefix_kernel"] = _causal_blocks
        return attend_in_blocks(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    causal = bool(module.is_causal if is_causal is None else is_causal)
    return _blocked_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, causal), None


def attend_aligned(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attend_in_blocks`, with padded keys where that helps the stock kernel. No causal query sees them."""
    length = query.shape[2]
    ours = (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and (module.is_causal if is_causal is None else is_causal)
        and attention_mask is None
        and length == key.shape[2]
        and length >= ALIGNED_FROM
        and length % sharing.ALIGNMENT
        and all(options.get(name) is None for name in (*sharing.UNKNOWN_TO_US, "shared_prefix", "packed_sequences"))
    )
    if not ours:
        return attend_in_blocks(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    padding = (0, 0, 0, -length % sharing.ALIGNMENT)
    key, value = F.pad(key, padding), F.pad(value, padding)
    output = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


def attend_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attending.attend`; in float32 no scores are computed of keys that stand behind a block of causal queries.

    The stock kernel computes the whole matrix of scores, causal or masked. 4 rows of 512 tokens, 4 heads of 64: 41.7 ms
    against 28.0, 19 rows of 100 tokens 9.7 against 8.6.
    """
    if query.dtype != torch.float32 or query.device.type != "cpu" or torch.is_grad_enabled() or dropout:
        return attending.attend(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    causal = module.is_causal if is_causal is None else is_causal
    if causal and query.shape[2] >= BLOCKS_FROM and _is_plain(module, query, key, attention_mask, options):
        return _stock_in_blocks(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    if options.get("sliding_window") is None:
        options["prefix_kernel"] = _stock_behind
    return attending.attend(module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options)


def _is_plain(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether a text attends to itself alone: nothing masked, nothing shared or packed, nothing that we do not know."""
    return (
        attention_mask is None
        and query.shape[2] == key.shape[2]
        and all(options.get(name) is None for name in sharing.UNKNOWN_TO_US)
        and not any(attending.follows(module, options.get(name)) for name in ("shared_prefix", "packed_sequences"))
    )


def _stock_behind(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """In place of `masked_attention`, as `_causal_blocks`."""
    if query.shape[2] < BLOCKS_FROM:
        return sharing.masked_attention(query, key, value, mask, dropout, scaling)
    return _stock_in_blocks(query, key, value, scaling).transpose(1, 2)


def _stock_in_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query (B, H, T, D), key and value (B, G, S, D), the queries at the end of the keys, causal -> (B, T, H, D)."""
    batch, heads, length, _ = query.shape
    before = key.shape[2] - length
    output = query.new_empty(batch, length, heads, value.shape[-1])
    for start in range(0, length, STOCK_BLOCK):
        stop = min(start + STOCK_BLOCK, length)
        seen = before + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool).tril(before + start)
        rows = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        output[:, start:stop] = rows.transpose(1, 2)
    return output


def _causal_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """In place of `masked_attention`, whose mask without a window is the one that blocks have anyway."""
    return _blocked_attention(query, key, value, scaling, causal=True).transpose(1, 2)


def _blocked_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    """query (B, H, T, D), key and value (B, G, S, D), the queries at the end of the keys -> (B, T, H, D)."""
    batch, heads, length, width = query.shape
    before = key.shape[2] - length
    groups, value_width = key.shape[1], value.shape[-1]
    shared = heads // groups  # query heads that share a key head are rows of one product
    query = (query * scaling).reshape(batch, groups, shared, length, width)
    keys = key.transpose(-1, -2)  # (B, G, D, T)
    output = query.new_empty(batch, length, groups, shared, value_width)
    block = QUERY_BLOCK if causal else WHOLE_BLOCK
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = before + (stop if causal else length)
        rows = query[:, :, :, start:stop].reshape(batch, groups, -1, width)  # (B, G, R, D)
        scores = torch.matmul(rows, keys[..., :seen]).view(batch, groups, shared, stop - start, seen)
        if causal:
            scores[..., before + start : seen] += _future(stop - start, scores.dtype)
        mixed = torch.matmul(scores.softmax(-1).view(batch, groups, -1, seen), value[:, :, :seen])  # (B, G, R, D)
        output[:, start:stop] = mixed.view(batch, groups, shared, stop - start, value_width).permute(0, 3, 1, 2, 4)
    return output.view(batch, length, heads, value_width)


@lru_cache(maxsize=2 * QUERY_BLOCK)
def _future(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size): -inf above the diagonal, 0 elsewhere."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu_(1)


def _attend_each(
    function: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`function`; of the patches of several pictures, one behind the other, it gets as many as have one size at a time.

    150 small pictures: 40 calls instead of 600, 3 % of the time of `Embedder.encode`.

    Args:
        cu_seq_lens_q: (B + 1,) where each picture begins, and N; None for a text.
    """
    if cu_seq_lens_q is None or module.is_causal:
        return function(module, query, key, value, attention_mask, **options)
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])  # (1, N, H, D)
    start = 0
    for length, alike in groupby(cu_seq_lens_q.diff().tolist()):
        count = len(list(alike))
        stop = start + count * length
        parts = (one[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for one in (query, key, value))
        mixed, _ = function(module, *parts, None, **options)  # (B, T, H, D)
        output[0, start:stop] = mixed.flatten(0, 1)
        start = stop
    return output, None


def _use_attention(model: nn.Module, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Points every part of the model that uses the stock fused attention to this one."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, partial(_attend_each, function))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation in ("sdpa", attending.ATTENTION):
            module.set_attn_implementation(ATTENTION)
