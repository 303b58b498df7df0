"""RMSNorm, rotary positions and feed-forwards on a CPU: the stock formulas in fewer passes over memory.

Between its products a decoder reads and writes its hidden states again and again; of a narrow one in bfloat16 that was
45 % of the time on an Intel processor with AMX, and most of it these three:

* An RMSNorm of transformers makes three float32 copies of its input and four further passes. Here one float32 buffer
  receives a block of rows, is normalised in place and written out, before the next block: it stays in the cache of a
  core. 2,048 tokens of 256 in bfloat16: 770 -> 322 us, with one rounding less than the stock; in float32 573 -> 286.
* Rotary positions negate, concatenate, multiply twice and add: with the sign moved to the sine, which the heads share,
  a concatenation and two in-place operations are left. 4 heads of 64: 582 -> 403 us, in float32 865 -> 492. Vision
  towers of the Qwen-VL families rotate in float32, here in blocks as well: 5,496 patches, 4 heads of 32, 2,482 -> 916.
* A feed-forward writes and reads its wide inside (three times with a gate). Rows do not meet in it, so it is computed
  for some hundred rows at a time, whose inside stays in the cache: 4,096 tokens, 256 -> 768 -> 256 with a gate, in
  bfloat16 9.2 -> 5.6 ms, in float32 29.7 -> 22.0; 2,048 tokens 3.8 -> 3.2 and 15.0 -> 10.8. With matrix units (AMX)
  bfloat16 products apply the activation and the gate on their way, by the operators of torch's compiler: 5.1 -> 3.9.

Nothing is told from names alone: a module or a function is replaced when random inputs show that it computes this
formula. The replacement is its class, a subclass that hands on to the stock whatever is not inference on a CPU. Pickles
and deep copies are of the stock class, so that what was saved opens without this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 2**17  # float32 numbers (512 KB) a core normalises at a time; 256 KB and 1 MB took 2 to 15 % longer
ATTENTION = "mmembed_cpu"  # the name of ours in transformers
FLASH = "is_flash_attention_requested"  # in transformers: if not, vision towers call their attention once a picture
DTYPES = (torch.float32, torch.bfloat16)
SCALES = (1e-6, 1e-3, 1.0, 30.0)  # of the rows of a probe: among small ones epsilon is seen, whatever it is
ROTATED = 2**16  # the same for rotations, which hold two such blocks
ROWS = 512  # tokens a core sends through a feed-forward at a time; 256 and 1,024 took 0 to 20 % longer
FUSED_ROWS = 2048  # the same where the products apply the activation; 512 took 24, on two threads 1,024 4 % longer
FUSED_ERROR = 0.02  # relative, of a probe whose steps round to .004 each; a gate in the wrong place is off by 1
ACTIVATIONS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {  # oneDNN's name and algorithm -> the function
    ("swish", ""): functional.silu,
    ("gelu", "none"): functional.gelu,
    ("gelu", "tanh"): partial(functional.gelu, approximate="tanh"),
}
Rotation = Callable[..., tuple[Tensor, Tensor]]


def accelerate_elementwise(model: nn.Module, *, fused: bool = False) -> None:
    """Changes the classes of norms and attentions in place. Weights, names and types stay.

    Args:
        fused: let bfloat16 products of feed-forwards apply the activation; pays on matrix units.

    What patches a module of transformers afterwards (its `apply_rotary_pos_emb`, say) is not seen by attentions
    prepared before, but by those prepared from then on.
    """
    feed_forward: dict[type[nn.Module], type[nn.Module] | None] = {}  # a class is tried once: weights may be large
    for module in model.modules():
        if not isinstance(module, Quick):
            form = _norm_form(module)
            stock: Any = type(module)  # for mypy, which holds classes of modules for unhashable
            if form is not None:
                better: type[nn.Module] | None = _norm_class(stock, *form)
            else:
                if stock not in feed_forward:
                    feed_forward[stock] = _feed_forward_class(stock, module, fused)
                better = feed_forward[stock] or _rotary_class(stock)
            if better is not None:
                module.__class__ = better


class Quick(nn.Module):
    """Stands before the stock class: copies and pickles are of that one."""

    stock: type[nn.Module]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return object.__new__, (self.stock,), vars(self)


def subclass(stock: type[nn.Module], base: type[Quick], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass of the same name, which libraries look at (initialisation, wrapping of layers)."""
    known = {"stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (base, stock), known | members)


# RMSNorm ------------------------------------------------------------------------------------------------------------


class QuickNorm(Quick):
    weight: nn.Parameter
    epsilon: str  # name of the attribute
    offset: float  # added to the weight: 1 in Gemma

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """(..., D) -> (..., D). Called by the name that the stock gives its input, it is the stock."""
        if torch.is_grad_enabled() or named or len(inputs) != 1 or not self._narrow(inputs[0]):
            stock: Tensor = super().forward(*inputs, **named)
            return stock
        return rms_norm(inputs[0], self.weight, vars(self)[self.epsilon], self.offset)

    def _narrow(self, hidden: Tensor) -> bool:
        alike = hidden.device.type == "cpu" and hidden.dtype == self.weight.dtype and hidden.dtype in DTYPES
        return alike and hidden.numel() > 0


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * (weight + offset): (..., D) and (D,) -> (..., D), computed in float32."""
    width = hidden.shape[-1]
    rows = hidden.reshape(-1, width)  # (N, D)
    output = torch.empty_like(rows)
    weight = weight.float() + offset if offset else weight.float()
    size = min(max(1, BLOCK * torch.get_num_threads() // width), len(rows))
    buffer = None if rows.dtype == torch.float32 else torch.empty(size, width)
    for block, result in zip(torch.split(rows, size), torch.split(output, size), strict=True):
        if buffer is None:
            torch.mul(block, root_scale(block, eps), out=result).mul_(weight)
        else:
            exact = buffer[: len(block)].copy_(block)
            result.copy_(exact.mul_(root_scale(exact, eps)).mul_(weight))
    return output.view(hidden.shape)


def root_scale(rows: Tensor, eps: float) -> Tensor:
    """(N, D) -> (N, 1). The norm is the fastest sum of squares that torch has: one pass, nothing written."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()


@cache
def _norm_class(stock: type[nn.Module], epsilon: str, offset: float) -> type[nn.Module]:
    return subclass(stock, QuickNorm, {"epsilon": epsilon, "offset": offset})


def _norm_form(module: nn.Module) -> tuple[str, float] | None:
    """(attribute that holds epsilon, offset of the weight) with which `rms_norm` is what this module computes."""
    weight = module._parameters.get("weight")
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    known = (
        len(module._parameters) == 1 and not module._modules and not module._buffers and "forward" not in vars(module)
    )
    if weight is None or weight.dim() != 1 or not known or not numbers:
        return None
    generator = torch.Generator().manual_seed(0)
    trial = torch.rand(weight.shape[0], generator=generator) + 0.5  # (D,)
    hidden = torch.randn(len(SCALES), weight.shape[0], generator=generator) * torch.tensor(SCALES)[:, None]
    probe = copy.copy(module)
    vars(probe)["_parameters"] = {"weight": nn.Parameter(trial)}  # its own: the module's may be anywhere, and all ones
    with torch.no_grad():
        stock = outcome(probe.forward, hidden)
        for name, value in numbers.items():
            for offset in (0.0, 1.0):
                if _alike(stock, rms_norm(hidden, trial, value, offset)):
                    return name, offset
    return None


# Feed-forwards ------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """Which linear map the activation follows (the first, but for some gates), and its names in oneDNN."""

    gate: int
    activation: str
    algorithm: str


class ByRows(Quick):
    form: Form | None  # what `fused_rows` is to compute; None for the stock formula

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """(..., D) -> (..., D), some rows after the others; for a gradient, or by name, as the stock."""
        stock = super().forward
        alone = len(inputs) == 1 and not named and not torch.is_grad_enabled() and inputs[0].device.type == "cpu"
        if alone and self.form is not None and inputs[0].dtype == torch.bfloat16 and inputs[0].numel():
            linear = linear_children(self)
            if all(_is_plain(one, torch.bfloat16) for one in linear):
                return fused_rows(inputs[0], linear, self.form)
        size = ROWS * torch.get_num_threads()
        if not alone or inputs[0].numel() < 2 * size * inputs[0].shape[-1]:
            whole: Tensor = stock(*inputs, **named)
            return whole
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # (N, D)
        return torch.cat([stock(block) for block in torch.split(rows, size)]).view(inputs[0].shape)


def fused_rows(hidden: Tensor, linear: list[nn.Linear], form: Form, onto: Tensor | None = None) -> Tensor:
    """(..., D) -> (..., D): two linear maps with an activation between, or three with a gate, in as many products.

    Args:
        onto: (N, D), what the result is added to, in place.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
    first, last = linear[form.gate], linear[-1]
    output = rows.new_empty(len(rows), last.out_features) if onto is None else onto
    size, product = FUSED_ROWS * torch.get_num_threads(), torch.ops.mkldnn._linear_pointwise
    for block, result in zip(torch.split(rows, size), torch.split(output, size), strict=True):
        inside = product(block, first.weight, first.bias, form.activation, [], form.algorithm)
        if len(linear) == 3:
            wide = linear[1 - form.gate]
            inside = product.binary(block, inside, wide.weight, wide.bias, "mul")
        if onto is not None:
            result.addmm_(inside, last.weight.T)
            if last.bias is not None:
                result.add_(last.bias)
        elif last.bias is None:
            torch.mm(inside, last.weight.T, out=result)
        else:
            torch.addmm(last.bias, inside, last.weight.T, out=result)
    return output.view(*hidden.shape[:-1], -1)


def linear_children(module: nn.Module) -> list[Any]:
    return [child for child in module.children() if hasattr(child, "in_features")]


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    """Whether it is a product alone: no adapter, no other kind of weight, no hook."""
    hooked = type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks
    return not hooked and linear.weight.dtype == dtype


@cache
def _by_rows_class(stock: type[nn.Module], form: Form | None) -> type[nn.Module]:
    return subclass(stock, ByRows, {"form": form})


def _feed_forward_class(stock: Any, module: nn.Module, fused: bool) -> type[nn.Module] | None:
    if not _is_feed_forward(module):
        return None
    return _by_rows_class(stock, _fused_form(module) if fused else None)


def _fused_form(module: nn.Module) -> Form | None:
    """With which `fused_rows` is what this module computes; None where no form is that of its numbers."""
    linear, others = linear_children(module), [one for one in module.children() if not hasattr(one, "in_features")]
    if len(others) != 1 or not all(_is_plain(one, torch.bfloat16) for one in linear):
        return None
    points = torch.linspace(-6, 6, 101)
    rows = torch.randn(8, linear[0].in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        curve = outcome(others[0], points)
        inside = torch.cat([one(rows.bfloat16()) for one in linear[:-1]]).float().std()
        rows = (2 / inside.clamp_min(1e-6) * rows).bfloat16()  # where the activation bends
        stock = outcome(module.forward, rows)
        for (activation, algorithm), function in ACTIVATIONS.items():
            for gate in range(len(linear) - 1 if _alike(curve, function(points), atol=1e-6) else 0):
                form = Form(gate, activation, algorithm)
                ours = outcome(lambda block, form=form: fused_rows(block, linear, form), rows)
                if isinstance(stock, Tensor) and near(stock, ours):
                    return form
    return None


def near(stock: Tensor, ours: object) -> bool:
    """In bfloat16: rounded elsewhere, but the same formula."""
    if not isinstance(ours, Tensor) or ours.shape != stock.shape:
        return False
    return bool((stock.float() - ours.float()).norm() < FUSED_ERROR * stock.float().norm())


def _is_feed_forward(module: nn.Module) -> bool:
    """Whether it is two or three linear maps and an activation, and random rows show that they do not meet in it."""
    linear = linear_children(module)
    others = [child for child in module.children() if not hasattr(child, "in_features")]
    plain = not module._parameters and not module._buffers and "forward" not in vars(module)
    if not plain or len(linear) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return False
    weight = next(module.parameters())
    if weight.device.type != "cpu" or not weight.is_floating_point():
        return False
    width = int(cast("nn.Linear", linear[0]).in_features)
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        stock = outcome(module.forward, rows)
        together = outcome(module.forward, rows[None])
        alone = [outcome(module.forward, row) for row in rows.split(1)]
    if not isinstance(stock, Tensor) or stock.shape != rows.shape or not all(isinstance(one, Tensor) for one in alone):
        return False
    rtol = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return _alike(stock[None], together, 1e-6, rtol) and _alike(stock, torch.cat(alone), 1e-6, rtol)


# Rotary positions ---------------------------------------------------------------------------------------------------


def rotate(
    stock: Rotation, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D), key (B, G, T, D), cos and sin (B, T, D) -> query and key, rotated. Else `stock` does it."""
    alike = query.dtype == key.dtype == cos.dtype == sin.dtype
    if not alike or not _rotatable(query, key, cos, sin):
        return stock(query, key, cos, sin, unsqueeze_dim)
    cos, signed = cos.unsqueeze(unsqueeze_dim), signed_sines(sin).unsqueeze(unsqueeze_dim)
    return _turned(query, cos, signed), _turned(key, cos, signed)


def rotate_vision(stock: Rotation, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query and key (S, H, D), cos and sin (S, D) -> query and key, rotated in float32. Else `stock` does it."""
    narrow = {query.dtype, key.dtype, cos.dtype, sin.dtype} <= set(DTYPES)
    if not narrow or query.dim() != 3 or cos.dim() != 2 or not _rotatable(query, key, cos, sin):
        return stock(query, key, cos, sin)
    cos, signed = cos.float().unsqueeze(1), signed_sines(sin.float()).unsqueeze(1)  # (S, 1, D)

    def turned(tensor: Tensor) -> Tensor:
        output = torch.empty_like(tensor)
        size = max(1, ROTATED * torch.get_num_threads() // tensor[0].numel())
        blocks = (torch.split(part, size) for part in (tensor, cos, signed, output))
        for rows, cosine, sine, result in zip(*blocks, strict=True):
            result.copy_(_turned(rows.float(), cosine, sine))
        return output

    return turned(query), turned(key)


def _rotatable(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    whole = query.shape[-1] == key.shape[-1] == cos.shape[-1] == sin.shape[-1] and query.shape[-1] % 2 == 0
    return whole and not torch.is_grad_enabled() and query.device.type == "cpu" and query.numel() > 0


def signed_sines(sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _turned(tensor: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    half = tensor.shape[-1] // 2
    return torch.cat([tensor[..., half:], tensor[..., :half]], dim=-1).mul_(signed).addcmul_(tensor, cos)


# name in transformers -> ours, and shapes of query, key, cos and sin by which the two are compared
ROTARY: dict[str, tuple[Rotation, tuple[tuple[int, ...], ...]]] = {
    "apply_rotary_pos_emb": (rotate, ((2, 4, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8))),
    "apply_rotary_pos_emb_vision": (rotate_vision, ((3, 4, 8), (3, 4, 8), (3, 8), (3, 8))),
}


def _rotary_class(stock: Any) -> type[nn.Module] | None:
    """A subclass of a module class whose forward is its own code, in which a name of `ROTARY` means ours; or None."""
    forward = stock.forward
    if not isinstance(forward, FunctionType):
        return None
    names = [name for name in ROTARY if name in forward.__code__.co_names]
    return _made_of(stock, forward, tuple((name, forward.__globals__.get(name)) for name in names))


@cache
def _made_of(
    stock: type[nn.Module], forward: FunctionType, found: tuple[tuple[str, Any], ...]
) -> type[nn.Module] | None:
    """`_rotary_class` of a forward and the functions it calls now: libraries put others in their place."""
    ours = {name: partial(ROTARY[name][0], function) for name, function in found if _rotates(function, name)}
    if not ours:
        return None
    names = {**forward.__globals__, **ours}
    if "apply_rotary_pos_emb_vision" in ours and FLASH in forward.__code__.co_names:
        names[FLASH] = partial(_takes_pictures, names[FLASH])
    quick = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    quick.__kwdefaults__ = forward.__kwdefaults__
    return subclass(stock, Quick, {"forward": quick})


def _takes_pictures(stock: Callable[[Any], bool], config: Any) -> bool:
    """Whether an attention gets the patches of all pictures in one call, and their numbers, as FlashAttention does."""
    return stock(config) or (config._attn_implementation == ATTENTION and not torch.is_grad_enabled())


def _rotates(function: Any, name: str) -> bool:
    """Whether the stock function is what ours of that name computes."""
    generator = torch.Generator().manual_seed(0)
    ours, shapes = ROTARY[name]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        stock, expected = outcome(function, *tensors), ours(function, *tensors)
    pair = isinstance(stock, tuple) and len(stock) == 2
    return pair and all(_alike(one, other, atol=1e-6) for one, other in zip(stock, expected, strict=True))


# Probes -------------------------------------------------------------------------------------------------------------


def outcome(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """What the function makes of clones of these; None where it takes none such, which is its own business."""
    try:
        return function(*(tensor.clone() for tensor in tensors))
    except Exception:
        return None


def _alike(stock: object, ours: object, atol: float = 0.0, rtol: float = 1e-5) -> bool:
    if not isinstance(stock, Tensor) or not isinstance(ours, Tensor):
        return False
    return stock.shape == ours.shape and stock.dtype == ours.dtype and torch.allclose(stock, ours, rtol=rtol, atol=atol)
