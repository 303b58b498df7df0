"""An adapter becomes part of the weights: W + s B A in float32, rounded once, when the weights are written.

Everything is loaded in float32 for it, four bytes a parameter of the whole backbone. A base in 4 bits is first written
out as the numbers that its adapter was trained against (a merge into 4 bits would round the sum; a merge into the
weights that were there before 4 bits would be another model). Adapters that are no change of weights cannot be merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mmembed.backbones.adapters import adapted
from mmembed.config.blocks import PROMPT_TYPES
from mmembed.errors import MmembedError
from mmembed.models.embedding_model import EmbeddingModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OF_4_BITS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
_OF_4_BITS_IN_CONFIG = ("quantization_config", "_pre_quantization_dtype")


def merged(model: EmbeddingModel) -> EmbeddingModel:
    """The model without an adapter, its weights changed in place. One without an adapter is given back as it is.

    Raises:
        MmembedError: the adapter puts tokens in front of the input, which no weights do.
    """
    settings = model.settings
    if settings.adapter_type == "none":
        return model
    if settings.adapter_type in PROMPT_TYPES:
        raise MmembedError(
            f"adapter '{settings.adapter_type}': puts trained vectors in front of every input, which cannot become "
            "part of the weights; export --to adapter, which peft loads, or train LoRA"
        )
    peft_model = adapted(model.backbone)
    if settings.adapter_type == "qlora":
        _write_out(peft_model)
    base = cast("PreTrainedModel", peft_model.merge_and_unload())
    if settings.adapter_type == "qlora":
        for owner, marks in ((base, _OF_4_BITS), (base.config, _OF_4_BITS_IN_CONFIG)):
            for mark in marks:
                vars(owner).pop(mark, None)
    without = replace(settings, adapter=None)
    return EmbeddingModel(base, model.family, model.pooling, model.projection, model.normalize, without).eval()


@torch.no_grad()
def _write_out(module: nn.Module) -> None:
    """Linear layers in 4 bits as layers in float32, in place."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as Adapted4bit
    from peft.tuners.lora.layer import Linear as AdaptedLinear

    def written_out(layer: Any) -> nn.Linear:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()  # (out, in)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.data.float(), requires_grad=False)
        return linear

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            layer: Any = child
            if isinstance(child, Adapted4bit):
                layer.base_layer = written_out(layer.base_layer)
                layer.__class__ = AdaptedLinear  # whose merge adds, where that of 4 bits rounds again
            elif isinstance(child, Linear4bit) and not isinstance(parent, Adapted4bit):
                setattr(parent, name, written_out(child))
