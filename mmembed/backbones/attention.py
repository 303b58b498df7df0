"""The decoder's attention under a name of ours: rows that share a prefix, packed sequences, else transformers' own.

Which of them a forward is, its layout says, an argument that transformers hands on to every attention layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmembed.backbones.block_attention import Blocks, attend_blocks
from mmembed.backbones.packed import Packed, attend_packed
from mmembed.backbones.shared_prefix import Kernel, SharedPrefix, attend_behind, masked_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "mmembed_sdpa"
LAYER_TYPES = {"full_attention", "sliding_attention"}


def prepare(model: PreTrainedModel) -> str | None:
    """Points the decoder's attention to `attend`, in place. Returns why that cannot be, or None."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"attn_implementation is '{config._attn_implementation}', not 'sdpa'"
    other = set(vars(config).get("layer_types") or ()) - LAYER_TYPES
    if other:
        return f"the backbone has layers of another kind ({', '.join(sorted(other))})"
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config._attn_implementation_internal = ATTENTION  # of the decoder alone; the public name would tell the towers too
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prefix: SharedPrefix | None = None,
    packed_sequences: Packed | None = None,
    prefix_kernel: Kernel = masked_attention,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers; transformers' own where nothing is shared or packed.

    Args:
        prefix_kernel: computes the attention behind a shared prefix.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if follows(module, packed_sequences):
        assert packed_sequences is not None
        return attend_packed(packed_sequences, query, key, value, dropout, scaling, **options), None
    if follows(module, shared_prefix):
        assert shared_prefix is not None
        if isinstance(shared_prefix, Blocks):
            layer = vars(module).get("layer_idx")
            found = attend_blocks(
                shared_prefix, layer, query, key, value, dropout, scaling, prefix_kernel, **options
            )  # fmt: skip
            return found, None
        return attend_behind(shared_prefix, query, key, value, dropout, scaling, prefix_kernel, **options), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


def follows(module: nn.Module, layout: SharedPrefix | Packed | None) -> bool:
    """Whether this attention is one of the decoder that runs a shared prefix, or packed sequences."""
    return layout is not None and vars(module).get("config") is layout.config
