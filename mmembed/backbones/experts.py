"""Decoders whose feed-forwards are mixtures of experts: their parts, and where their routers send tokens.

    y = sum_{i in top k of p} p_i / norm * expert_i(x)        p = softmax(W x), a token's own: no token sees another's

A token's experts follow from its hidden state alone: there is no capacity and no noise, so a chunk that GradCache runs
twice (dropout repeats by the random state) is routed alike both times, and vectors do not depend on the rest of the
batch.
transformers holds the experts of a layer as two parameters (experts, out, in), which LoRA adapts as such.

Routers are watched by hooks that act inside of `recording` alone: neither for another thread, nor when checkpointing
runs a layer again in the backward pass. Cost where they are watched: 2 numbers a token and expert in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmembed.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Decoders whose routers choose the k largest of a softmax and tell its logits first (tests/unit/test_experts.py).
KNOWN = ("qwen3_moe", "mixtral", "qwen3_vl_moe_text", "qwen3_omni_moe_text")
ROUTERS = r"\.mlp\.gate(\.|$)"  # their parameters
_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Mixture:
    """How many experts a layer has, and how many of them a token goes through."""

    experts: int
    chosen: int


def mixture_of(config: Any) -> Mixture | None:
    """Of a backbone's configuration; None of a dense one."""
    text = config.get_text_config().to_dict()
    experts = text.get("num_experts") or text.get("num_local_experts")
    return Mixture(int(experts), int(text["num_experts_per_tok"])) if experts else None


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters (experts, out, in); of another model none."""
    return [name for name, _ in model.named_parameters() if _EXPERTS.search(name)]


def active_parameters(model: nn.Module, config: Any) -> int:
    """How many parameters of a model (adapters included) a token goes through: of experts, the chosen share."""
    mixture = mixture_of(config)
    used = {name: one.numel() for name, one in model.named_parameters() if ".original_module." not in name}
    every = sum(used.values())
    if mixture is None:
        return every
    of_experts = sum(count for name, count in used.items() if ".experts." in name)
    return every - of_experts * (mixture.experts - mixture.chosen) // mixture.experts


def check_experts(model: PreTrainedModel, experts: bool, router: bool) -> None:
    """Raises ConfigError where an adapter of experts, or a trained router, is asked of a backbone without any."""
    kind = model.config.get_text_config().model_type
    if experts and not expert_parameters(model):
        raise ConfigError(
            f"adapter.experts: '{kind}' has no experts in the form that peft adapts (experts.gate_up_proj and "
            "experts.down_proj); remove it"
        )
    if router and not router_names(model):
        raise ConfigError(f"adapter.router: '{kind}' has no router that is known here ({', '.join(KNOWN)}); remove it")


def router_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that choose experts; none of decoders that are not known."""
    if model.config.get_text_config().model_type not in KNOWN:
        return []
    return [name for name, _ in model.named_modules() if re.search(r"(^|\.)mlp\.gate$", name)]


# Where tokens went ----------------------------------------------------------------------------------------------------


@dataclass
class Routes:
    """What the routers of one forward pass said, summed over its layers.

    Attributes:
        layers: how many said something.
        found: (N, 2 * experts) of N tokens: probabilities, with gradients, then how often each expert was chosen.
        choices: each layer's (N, k) experts, best first.
    """

    chosen: int
    layers: int = 0
    found: Tensor | None = None
    choices: list[Tensor] = field(default_factory=list)

    def note(self, logits: Tensor) -> None:
        """Adds a layer's logits (N, experts)."""
        probabilities = logits.float().softmax(-1)  # (N, experts)
        best = probabilities.detach().topk(self.chosen, dim=-1).indices  # (N, k)
        counts = F.one_hot(best, logits.shape[-1]).sum(1).float()  # (N, experts)
        both = torch.cat([probabilities, counts], dim=-1)
        self.found = both if self.found is None else self.found + both
        self.layers += 1
        self.choices.append(best)


_routes: ContextVar[Routes | None] = ContextVar("where routers send tokens", default=None)


def watch_routers(model: PreTrainedModel, what: str) -> None:
    """Lets `recording` see the routers of a model.

    Args:
        what: needs it, for the message.

    Raises:
        ConfigError: it has none, or none that is known.
    """
    names = router_names(model)
    if not names:
        kind = model.config.get_text_config().model_type
        raise ConfigError(
            f"{what}: reads routers, and the decoder '{kind}' has none that is known here ({', '.join(KNOWN)}); remove "
            "it, or take such a backbone"
        )
    for name in names:
        model.get_submodule(name).register_forward_hook(_note)


def _note(module: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    routes = _routes.get()
    if routes is not None:
        routes.note(output[0])


@contextmanager
def recording(chosen: int) -> Iterator[Routes]:
    """Where the forward pass inside sends its tokens; `chosen` experts each."""
    routes = Routes(chosen)
    token = _routes.set(routes)
    try:
        yield routes
    finally:
        _routes.reset(token)


# Domains --------------------------------------------------------------------------------------------------------------

_bias: ContextVar[Tensor | None] = ContextVar("what a domain adds to router logits", default=None)


class DomainRouter(nn.Module):
    """Stands before the class of a decoder's router: adds a domain's bias to its logits, then chooses as it does."""

    layer: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H) -> logits (N, experts), weights of the chosen (N, k), and which these are (N, k)."""
        logits, weights, chosen = super().forward(hidden_states)
        bias = _bias.get()
        if bias is None:
            return logits, weights, chosen
        logits = logits + bias[self.layer].to(logits.dtype)
        best, chosen = logits.float().softmax(-1).topk(chosen.shape[-1], dim=-1)
        if vars(self).get("norm_topk_prob", True):  # Mixtral's has no such key, and does it always
            best = best / best.sum(-1, keepdim=True)
        return logits, best.to(weights.dtype), chosen


def condition_routers(model: PreTrainedModel) -> tuple[int, int]:
    """Lets the routers of a model, adapted or not, follow `biased`, in place. Returns how many layers have one, and the
    number of experts.

    Raises:
        ConfigError: the backbone is no mixture of experts, or its routers are not known.
    """
    mixture = mixture_of(model.config)
    found: list[nn.Module] = []
    for name in router_names(model):
        router = model.get_submodule(name)
        for part in router.modules():  # of a trained one peft keeps the original beside a copy
            if type(part).__name__.endswith("TopKRouter"):
                part.layer = len(found)  # type: ignore[assignment]
                stock: Any = type(part)
                part.__class__ = _conditioned(stock)
        found.append(router)
    if mixture is None or not found:
        kind = model.config.get_text_config().model_type
        raise ConfigError(
            f"data.train domain: conditions routers, and the decoder '{kind}' has none that is known here "
            f"({', '.join(KNOWN)}); remove it, or take such a backbone"
        )
    return len(found), mixture.experts


@cache
def _conditioned(stock: Any) -> type[nn.Module]:
    """A subclass of the same name, which libraries look at."""
    return type(
        stock.__name__, (DomainRouter, stock), {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    )


@contextmanager
def biased(bias: Tensor) -> Iterator[None]:
    """Routers inside add this (layers, experts) to their logits."""
    token = _bias.set(bias)
    try:
        yield
    finally:
        _bias.reset(token)


# Without weights ------------------------------------------------------------------------------------------------------

_OUTLINED = "mmembed_outline"


def outline_experts(model: PreTrainedModel) -> None:
    """Lets the experts of an outlined model run on tensors without contents, in place: which expert a token chose is
    not known then, so all go through the first. Shapes and memory are those of transformers' grouped products."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not expert_parameters(model):
        return
    ALL_EXPERTS_FUNCTIONS.register(_OUTLINED, _through_the_first)
    model.config.get_text_config()._experts_implementation_internal = _OUTLINED


def _through_the_first(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden (N, H), the experts chosen (N, k) and their weights (N, k) -> (N, H)."""
    count, several = chosen.shape
    repeated = hidden.repeat_interleave(several, dim=0)  # (N * k, H)
    gated = module._apply_gate(F.linear(repeated, module.gate_up_proj[0]))
    made = F.linear(gated, module.down_proj[0]) * weights.reshape(-1, 1)
    return made.view(count, several, -1).sum(1).to(hidden.dtype)
