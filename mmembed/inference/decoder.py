"""Decoder layers on a CPU with matrix units, in bfloat16: fewer passes over memory between their products.

With AMX the products of a narrow decoder take a third of its time. Norms, rotary positions and residual sums take as
long, most of it reading and writing. A layer here is the stock one (a norm, attention, a sum, a norm, a feed-forward, a
sum) in another order of work:

* queries, keys and values are one product into one buffer, where heads are normalised and rotated in place: a block of
  tokens becomes float32 once, instead of four times, and is rounded once;
* both sums are part of the products before them (`addmm`).

A layer of 4,096 tokens of 256 without its attention: 14 -> 10.5 ms. Products want many rows (their weights come from
the third-level cache each time), element-wise work few (its float32 blocks stay in the second-level cache): hence two
sizes of blocks.

A layer is replaced when a copy with random weights shows that it computes this formula; what was put into a layer
afterwards (an adapter, a hook, another module) makes it the stock again.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmembed.backbones.last_tokens import LastLayer
from mmembed.inference.elementwise import (
    ByRows,
    Quick,
    QuickNorm,
    accelerate_elementwise,
    fused_rows,
    linear_children,
    near,
    outcome,
    rms_norm,
    root_scale,
    signed_sines,
    subclass,
)
from mmembed.threads import NARROW

HEAD_ROWS = 512  # tokens whose heads a core normalises and rotates at a time; 1,024 took 3 % longer on one thread
LAYER_ROWS = 4096  # tokens a core sends from attention to the end of the layer; on two threads 2,048 took 7 % longer
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS, HEAD_NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")


def fuse_layers(model: nn.Module) -> None:
    """Changes the classes of decoder layers in place, after `accelerate_elementwise(fused=True)`."""
    tried: dict[type[nn.Module], type[nn.Module] | None] = {}
    for module in model.modules():
        stock: Any = type(module)
        if {name for name, _ in module.named_children()} == PARTS and not isinstance(module, Quick):
            if stock not in tried:
                tried[stock] = _layer_class(stock, _kinds(module)) if _is_layer(module) else None
            module.__class__ = tried[stock] or stock


class _QuickLayer(Quick):
    kinds: tuple[type[nn.Module], ...]  # of the modules in it

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """(B, T, D) -> (B, T, D); with a cache, for a gradient, or with anything unknown in it, as the stock."""
        if len(inputs) == 1 and not torch.is_grad_enabled() and self._takes(inputs[0], named):
            return _decode(self, inputs[0], **named)
        return super().forward(*inputs, **named)

    def _takes(self, hidden: Tensor, named: dict[str, Any]) -> bool:
        narrow = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and hidden.dim() == 3 and hidden.numel()
        if not narrow or self.training or named.get("past_key_values") is not None or _kinds(self) != self.kinds:
            return False
        if isinstance(self, LastLayer) and named.get("last_tokens") is not None:
            return False
        attention: Any = self.self_attn
        rotated = named.get("position_embeddings")
        shape = (hidden.shape[1], attention.head_dim)
        return (
            _interface(attention) is not None
            and isinstance(rotated, tuple)
            and all(one.dtype == hidden.dtype and one.dim() == 3 and one.shape[1:] == shape for one in rotated)
            and all(map(_is_bare, list(self.modules())[1:]))
        )


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing was put around it, and its weights are bfloat16."""
    touched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not touched and all(one is None or one.dtype == torch.bfloat16 for one in module._parameters.values())


def _decode(
    layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any = None, **named: Any
) -> Tensor:
    """hidden (B, T, D), cosines and sines (B or 1, T, d) -> (B, T, D)."""
    attention, named = layer.self_attn, {name: one for name, one in named.items() if name != "past_key_values"}
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
    normed = _normed(layer.input_layernorm, rows)
    cos, sin = (one.expand(len(hidden), -1, -1).reshape(len(rows), 1, -1) for one in position_embeddings)
    heads = _heads(attention, normed, cos, signed_sines(sin)).unflatten(0, hidden.shape[:2])  # (B, T, H + 2 G, d)
    count = attention.q_proj.out_features // attention.head_dim
    groups = attention.k_proj.out_features // attention.head_dim
    query, key, value = (one.transpose(1, 2) for one in heads.split((count, groups, groups), dim=2))
    mixed, _ = _interface(attention)(
        attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, **named
    )
    mixed, output = mixed.reshape(len(rows), -1), torch.empty_like(rows)
    size, form = LAYER_ROWS * torch.get_num_threads(), layer.mlp.form
    linear = linear_children(layer.mlp)
    for before, attended, block in zip(*(one.split(size) for one in (rows, mixed, output)), strict=True):
        projection = attention.o_proj
        torch.addmm(before, attended, projection.weight.T, out=block)
        if projection.bias is not None:
            block.add_(projection.bias)
        fused_rows(_normed(layer.post_attention_layernorm, block), linear, form, onto=block)
    return output.view(hidden.shape)


def _heads(attention: Any, normed: Tensor, cos: Tensor, sine: Tensor) -> Tensor:
    """normed (N, D), cosines and signed sines (N, 1, d) -> (N, H + 2 G, d): queries, keys, both rotated, and values."""
    linear = [attention.q_proj, attention.k_proj, attention.v_proj]
    weights = [one.weight for one in linear]
    if len(normed) >= normed.shape[-1]:  # one product instead of three gains what many copies of the weights take
        weights = [torch.cat(weights)]
    width, half = attention.head_dim, attention.head_dim // 2
    joined = normed.new_empty(len(normed), sum(len(one) for one in weights))
    for weight, part in zip(weights, joined.split([len(one) for one in weights], dim=-1), strict=True):
        torch.mm(normed, weight.T, out=part)
    if linear[0].bias is not None:
        joined.add_(torch.cat([one.bias for one in linear]))
    heads = joined.view(len(normed), -1, width)
    turned = heads[:, : (linear[0].out_features + linear[1].out_features) // width]  # (N, H + G, d)
    norms = [attention._modules[name] for name in HEAD_NORMS if name in attention._modules]
    each = [one.weight.expand(linear[place].out_features // width, -1) for place, one in enumerate(norms)]
    scale = torch.cat(each).float() if each else None  # (H + G, d)
    size = min(HEAD_ROWS * torch.get_num_threads(), len(normed))
    exact, swapped = torch.empty(2, size, *turned.shape[1:]).unbind()
    for block, cosine, signed in zip(*(one.split(size) for one in (turned, cos, sine)), strict=True):
        rows, other = exact[: len(block)].copy_(block), swapped[: len(block)]
        if scale is not None:
            root = root_scale(rows.view(-1, width), vars(norms[0])[norms[0].epsilon])
            rows.mul_(root.view(*rows.shape[:2], 1)).mul_(scale)
        torch.cat([rows[..., half:], rows[..., :half]], dim=-1, out=other)
        block.copy_(other.mul_(signed.float()).addcmul_(rows, cosine.float()))
    return heads


def _normed(norm: Any, rows: Tensor) -> Tensor:
    return rms_norm(rows, norm.weight, vars(norm)[norm.epsilon], norm.offset)


def _interface(attention: Any) -> Any:
    """The attention that transformers would call; None for its own unfused one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)


def _kinds(layer: nn.Module) -> tuple[type[nn.Module], ...]:
    return tuple(type(one) for one in layer.modules())[1:]


@cache
def _layer_class(stock: Any, kinds: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    return subclass(stock, _QuickLayer, {"kinds": kinds})


def _is_layer(layer: Any) -> bool:
    """Whether it is built as `_decode` wants, and random weights and inputs show that it computes the same."""
    if not _is_built(layer) or not all(map(_is_bare, layer.modules())):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(layer).eval()  # of the stock classes
    width, head = layer.input_layernorm.weight.shape[0], layer.self_attn.head_dim
    with torch.no_grad():
        for one in probe.parameters():  # the layer's own could hide what differs: norms of ones, small products
            random = torch.randn(one.shape, generator=generator)
            one.copy_(random / one.shape[-1] ** 0.5 if one.dim() > 1 else 1 + random / 4)
        hidden = (torch.randn(2, 8, width, generator=generator) / 8).bfloat16()  # small beside what the layer adds
        angles = (6 * torch.rand(2, 8, head // 2, generator=generator)).repeat(1, 1, 2)
        rotated = (angles.cos().bfloat16(), angles.sin().bfloat16())
        named: dict[str, Any] = {"position_embeddings": rotated, "attention_mask": None}
        stock = outcome(lambda rows: probe(rows, **named), hidden)
        accelerate_elementwise(probe, fused=True)
        ours = outcome(lambda rows: _decode(probe, rows, **named), hidden)
    return isinstance(stock, Tensor) and isinstance(ours, Tensor) and near(stock - hidden, ours - hidden)


def _is_built(layer: Any) -> bool:
    attention, feed_forward = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    children, known = dict(attention.named_children()), vars(attention)
    heads = [children.pop(name) for name in HEAD_NORMS if name in children]
    if not {"head_dim", "scaling", "config"} <= set(known) or set(children) != set(PROJECTIONS):
        return False
    linear = [children[name] for name in PROJECTIONS]
    whole = all(type(one) is nn.Linear for one in linear) and all(isinstance(one, QuickNorm) for one in norms + heads)
    if not whole or not isinstance(feed_forward, ByRows) or feed_forward.form is None or len(heads) == 1:
        return False
    width, head = norms[0].weight.shape[0], attention.head_dim
    return (
        width <= NARROW  # products of wider ones take most of the time anyway
        and head % 2 == 0
        and len({one.bias is None for one in linear[:3]}) == 1
        and all(one.weight.shape == (head,) and not one.offset for one in heads)
        and len({vars(one)[one.epsilon] for one in heads}) <= 1
        and vars(attention.config).get("sliding_window") is None
    )
