"""Hidden states of lower decoder layers, from the pass that computes the last; and backbones without upper layers.

Layer k is what k layers make of the tokens, seen through the final norm: the last hidden state of a backbone that ends
there. States are taken where the next layer gets them, so what a model adds between its layers (the visual features of
DeepStack, arXiv 2406.04334) is in them. Hooks that do it are there only in a model that was asked for layers, and act
only inside of `recording`: neither for another thread, nor when checkpointing runs a layer again in the backward pass.
Cost of a layer: a reference to its states, which a pass with gradients keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmembed.backbones.packed import KNOWN_DECODERS
from mmembed.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

# Decoders whose lower layers were compared with those of a backbone that ends there (tests/equivalence/test_layers.py).
KNOWN = (*KNOWN_DECODERS, "gemma")
_states: ContextVar[dict[int, Tensor] | None] = ContextVar("states of layers", default=None)


def decoder_of(model: PreTrainedModel) -> Any:
    """The text decoder: the part of the model that has the text configuration."""
    from transformers import PreTrainedModel

    kind = model.config.get_text_config().model_type
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.config.model_type == kind), model)


def check_layers(config: Any) -> None:
    """Raises ConfigError where lower layers of a decoder are not known to be what a shorter one gives.

    Args:
        config: of the decoder.
    """
    if config.model_type not in KNOWN:
        raise ConfigError(
            f"layers: those of the decoder '{config.model_type}' have not been compared with a shorter one's; known "
            f"are {', '.join(KNOWN)}"
        )


def watch(decoder: Any, layers: Collection[int]) -> list[RemovableHandle]:
    """Lets `recording` see the states behind these layers, of 1 to the number of layers - 1."""
    return [
        decoder.layers[layer].register_forward_pre_hook(partial(_note, layer), with_kwargs=True) for layer in layers
    ]


def _note(layer: int, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    states = _states.get()
    if states is not None:
        states[layer] = given[0] if given else options["hidden_states"]


@contextmanager
def recording() -> Iterator[dict[int, Tensor]]:
    """Layer -> its states, before the final norm, of the forward pass inside."""
    states: dict[int, Tensor] = {}
    token = _states.set(states)
    try:
        yield states
    finally:
        _states.reset(token)


def last_and_lower(decoder: Any, layers: Collection[int], run: Callable[[], Tensor]) -> list[Tensor]:
    """What `run` gives, and the states of these layers through the final norm, of as many tokens (the last ones)."""
    if not layers:
        return [run()]
    with recording() as states:
        last = run()  # (rows, tokens, H)
    return [last, *(decoder.norm(states[layer][:, -last.shape[1] :]) for layer in layers)]  # virtual tokens in front


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Drops the decoder layers above the first `count`, in place.

    Raises:
        ConfigError: there are not so many, or the decoder is not known.
    """
    config = model.config.get_text_config()
    if not 1 <= count <= config.num_hidden_layers:
        raise ConfigError(
            f"layers: found {count}; the backbone has {config.num_hidden_layers}, give 1 to {config.num_hidden_layers}"
        )
    if count == config.num_hidden_layers:
        return
    check_layers(config)
    decoder = decoder_of(model)
    decoder.layers = decoder.layers[:count]
    for one in {id(held): held for held in (config, decoder.config)}.values():
        kinds = vars(one).get("layer_types")
        if kinds:
            one.layer_types = kinds[:count]
        one.num_hidden_layers = count
