"""What a training step holds in memory, found without weights and without a device.

The real architecture, adapter and checkpointing included, runs forward and backward on tensors that have shapes and no
contents (torch's FakeTensorMode); a dispatch mode adds up the storages that are alive. So there is no formula a family:
what its layers save for the backward pass is what is counted, in the run's precision and attention. A vision tower has
control flow that follows picture sizes, so it runs in earnest, on real pictures, two layers deep and with arbitrary
weights, and is extrapolated by layer. Costs about a second a hundred decoder layers, and the memory of those two.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmembed.backbones.adapters import adapted
from mmembed.backbones.attention import ATTENTION
from mmembed.backbones.last_tokens import LastTokens, prepare_last
from mmembed.backbones.layers import decoder_of, last_and_lower
from mmembed.backbones.patches import in_dtype
from mmembed.config.blocks import PROMPT_TYPES
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.objectives import Objective

DEPTH = 2  # layers of a vision tower that are run


@dataclass(frozen=True)
class Graph:
    """Bytes of one chunk above weights and gradients.

    fixed, per_token: kept between the passes: once a chunk (autocast's copies of weights), and a padded token.
    working_fixed, per_token_working: more than that at the height of its backward pass.
    per_shared_token: kept for a token of a shared prefix and each row but one, which is not computed again.
    """

    fixed: float
    per_token: float
    working_fixed: float
    per_token_working: float
    per_shared_token: float = 0.0

    def kept(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def working(self, tokens: int) -> float:
        return self.working_fixed + self.per_token_working * tokens


@dataclass(frozen=True)
class Vision:
    """Bytes a visual token: kept for the backward pass (0 where the tower is frozen), and at work in the tower."""

    kept: float = 0.0
    working: float = 0.0


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside of it make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for item in tree_iter(made):
            if isinstance(item, Tensor):
                self._add(item.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:  # a view, or written in place
            return
        self._live[key] = storage.nbytes()
        self.now += self._live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def measure_chunk(model: EmbeddingModel, length: int, autocast: torch.dtype | None = None) -> Graph:
    """Memory of chunks whose longest input has `length` tokens.

    Args:
        model: of an outline: its parameters are on the meta device. They stay there.
        autocast: the dtype of the run's mixed precision.
    """
    one, two = (_run(model, rows, length, autocast) for rows in (1, 2))
    per_row, working_a_row = two[0] - one[0], (two[1] - two[0]) - (one[1] - one[0])
    return Graph(
        max(0.0, one[0] - per_row),
        per_row / length,
        max(0.0, one[1] - one[0] - working_a_row),
        working_a_row / length,
    )


def prefix_copies(model: EmbeddingModel, autocast: torch.dtype | None = None) -> float:
    """Bytes that attention keeps for a token of a shared prefix and a row behind it: copies of its keys and values, one
    a query head, in each layer (`mmembed.backbones.shared_prefix`). With gradient checkpointing no layer keeps them."""
    text = model.config.get_text_config()
    width = model.family.head_width
    size = torch.empty((), dtype=autocast or model.dtype).element_size()
    return float(2 * text.num_hidden_layers * text.num_attention_heads * width * size)


def _run(model: EmbeddingModel, rows: int, length: int, autocast: torch.dtype | None) -> tuple[float, float]:
    """(bytes of the graph, bytes at the height of forward and backward) of `rows` inputs."""
    model = copy.deepcopy(model)
    masks = _unmasked() if model.family.causal else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), masks:
        _without_contents(model)
        if model.reads_last:
            prepare_last(decoder_of(model.base))  # the copy's layer is the stock
        model.train()
        with Meter() as meter:
            for _ in range(2):  # in the second one gradients are there, and each weight has been seen
                start = meter.peak = meter.now
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    vectors = _vectors(model, rows, length)
                kept = meter.now - start
                torch.autograd.backward(vectors, [torch.ones_like(one) for one in vectors])
                del vectors
    return float(kept), float(meter.peak - start)


@contextmanager
def _unmasked() -> Iterator[None]:
    """Keeps transformers from building a mask that the run does not have: positions without contents look to it as if
    several sequences were packed into one. Sliding windows keep theirs."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **options: Any) -> Any:
        return sdpa_mask(*args, **{**options, "allow_is_causal_skip": True})

    for name in ("sdpa", ATTENTION):
        AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        for name in ("sdpa", ATTENTION):
            AttentionMaskInterface.register(name, sdpa_mask)


def _vectors(model: EmbeddingModel, rows: int, length: int) -> list[Tensor]:
    """As the model's forward, from token ids whose values do not matter."""
    kind = model.settings.adapter_type
    base: Any = model.backbone if kind == "none" else adapted(model.backbone).get_base_model()
    embedded = base.get_input_embeddings()(torch.zeros(rows, length, dtype=torch.long))  # (B, T, H)
    if kind in PROMPT_TYPES:  # virtual tokens in front, which all others' gradients reach
        virtual = int((model.settings.adapter or {})["num_virtual_tokens"])
        front = torch.zeros(rows, virtual, embedded.shape[2], dtype=embedded.dtype, requires_grad=True)
        embedded = torch.cat([front, embedded], dim=1)
    decoder = decoder_of(base)
    given: dict[str, Any] = {}
    if model.reads_last_alone and model.output_embedding is None:
        given["last_tokens"] = LastTokens(torch.full((rows,), length - 1))
    hidden = last_and_lower(
        decoder, model.lower_layers, lambda: decoder(inputs_embeds=embedded, **given).last_hidden_state
    )
    mask = torch.ones(hidden[0].shape[:2], dtype=torch.bool)
    return [model.head(one, mask) for one in hidden]  # (B, E) each


def _without_contents(module: nn.Module) -> None:
    """Puts tensors of the current FakeTensorMode in the place of parameters and buffers; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                fresh = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), fresh)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


# The vision tower -----------------------------------------------------------------------------------------------------


def measure_vision(
    build: Callable[[int], EmbeddingModel],
    layers: int,
    tensors: dict[str, Tensor],
    visual_tokens: int,
    autocast: torch.dtype | None,
) -> Vision:
    """Memory of the vision tower and projector a visual token.

    Args:
        build: number of vision layers -> the outlined model.
        layers: how many the real tower has.
        tensors: of `Family.image_tensors` for some pictures, which take `visual_tokens` in the language model.
    """
    shallow, deep = (_run_vision(build(depth), tensors, autocast) for depth in (DEPTH, DEPTH + 1))
    kept = shallow[0] + (deep[0] - shallow[0]) * (layers - DEPTH)
    working = max(deep[1] - deep[0], 0.0)
    return Vision(kept / visual_tokens, working / visual_tokens)


def _run_vision(model: EmbeddingModel, tensors: dict[str, Tensor], autocast: torch.dtype | None) -> tuple[float, float]:
    kind = model.settings.adapter_type
    base: Any = model.backbone if kind == "none" else adapted(model.backbone).get_base_model()
    _fill(base)
    wanted = inspect.signature(base.get_image_features).parameters
    model.train()
    with Meter() as meter:
        for _ in range(2):
            start = meter.peak = meter.now
            given = {
                name: in_dtype(tensor, model.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
                for name, tensor in tensors.items()
                if name in wanted
            }  # made here: counted, and as long as the graph needs them
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                features = _floating(base.get_image_features(**given))
            del given
            kept = meter.now - start
            trained = [feature for feature in features if feature.requires_grad]
            if trained:
                torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
            del features, trained
    return float(kept), float(meter.peak - start)


def _fill(base: Any) -> None:
    """Gives every parameter and buffer outside of the text decoder memory, of zeros."""
    decoder = decoder_of(base)
    language = {id(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    for part in base.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and id(parameter) not in language:
                empty = torch.zeros(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and id(buffer) not in language:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _floating(output: Any) -> list[Tensor]:
    return [item for item in tree_iter(output) if isinstance(item, Tensor) and item.is_floating_point()]


_EXPERTS = 128  # of Qwen3-MoE: what is compared of routers is small beside vectors


# What follows from numbers --------------------------------------------------------------------------------------------


def measure_objective(objective: Objective, labels: BatchLabels, size: int, vectors_an_input: int) -> float:
    """Bytes that a comparison of these labels' queries and documents takes at its height, its gradient included."""
    shape = (size,) if vectors_an_input == 1 else (vectors_an_input, size)

    def embeddings(count: int, trained: bool = True) -> Embeddings:
        vectors = torch.randn(count, *shape, requires_grad=trained)
        mask = None if vectors_an_input == 1 else torch.ones(count, vectors_an_input, dtype=torch.bool)
        layers = {int(layer): torch.randn_like(vectors, requires_grad=True) for layer in objective.layers}
        routing = torch.ones(count, 2 * _EXPERTS, requires_grad=True) if objective.routes else None
        if not objective.predicts:
            return Embeddings(vectors, mask, layers, routing=routing)
        nll, predicted = torch.zeros(count, requires_grad=True), torch.ones(count)
        return Embeddings(vectors, mask, layers, nll, predicted, routing)

    queries, documents = embeddings(len(labels.query_keys)), embeddings(len(labels.owner))
    if objective.teacher_momentum is not None:
        taught = embeddings(len(labels.query_keys), False), embeddings(len(labels.owner), False)
        labels = replace(labels, taught=taught)
    if any(isinstance(part, Objective) and part.guide_model for part in objective.modules()):  # of about this size
        guide = torch.randn(len(labels.query_keys), size), torch.randn(len(labels.owner), size)
        labels = replace(labels, guide=guide)
    with Meter() as meter:
        loss, _ = objective(queries, documents, labels)
        torch.autograd.grad(loss, [*queries.tensors, *documents.tensors], allow_unused=True)  # MoCo's documents, tokens
    return float(meter.peak)


def trained_parameters(model: nn.Module) -> list[tuple[Tensor, bool]]:
    """(parameter, whether it is a token table) of those that are trained."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    return [(one, id(one) in tables) for one in model.parameters() if one.requires_grad]


def gradient_bytes(parameters: Sequence[tuple[Tensor, bool]]) -> float:
    """Bytes of the gradients of `trained_parameters`, of the parameters' own type."""
    return float(sum(parameter.numel() * parameter.element_size() for parameter, _ in parameters))


def optimizer_bytes(name: str, parameters: Sequence[tuple[Tensor, bool]], master: bool = False) -> tuple[float, bool]:
    """Bytes of the optimizer's state, and whether this optimizer is known (else it is counted as AdamW).

    Args:
        name: of `training.optimizer`, or transformers' own names.
        parameters: (trained parameter, whether it is a token table).
        master: state in 32 bits whatever the parameter is, as DeepSpeed keeps it.
    """
    kind = next((kind for kind, names in _STATES.items() if name in names), None)
    return sum(_state(kind or "adamw", parameter, table, master) for parameter, table in parameters), kind is not None


_STATES = {
    "adamw": ("adamw", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "stable_adamw"),
    "adamw_8bit": ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    "one": ("lion", "lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"),
    "one_8bit": ("lion_8bit", "paged_lion_8bit"),
    "adafactor": ("adafactor",),
    "none": ("sgd",),
}
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096  # bitsandbytes: values a scale, and values from which a tensor is quantised


def _state(kind: str, parameter: Tensor, table: bool, master: bool) -> float:
    values, size = parameter.numel(), 4 if master else parameter.element_size()
    if kind == "none":
        return 0.0
    if kind == "adafactor":  # a sum a row and a column (transformers keeps them in 32 bits)
        if parameter.ndim < 2:
            return 4.0 * values
        return 4.0 * (values // parameter.shape[-1] + values // parameter.shape[-2])
    moments = 2 if kind in ("adamw", "adamw_8bit") else 1
    if kind.endswith("_8bit"):
        if values < _SMALLEST_8BIT or table:
            return 4.0 * moments * values
        return moments * (values + 4.0 * -(-values // _BLOCK_8BIT))
    return float(moments * values * size)
