"""The output embedding of a decoder, and what its tokens cost to predict: a language-model loss beside the vectors.

nll_t = logsumexp_v( w_v . h_{t-1} ) - w_{x_t} . h_{t-1}

h are the last hidden states of the pass that also gives the vectors (CoCa, arXiv 2205.01917; COSMO, 2401.00849), W
(V, H) is the input embedding where a backbone ties the two; else it is read from the backbone's own file, which
`load_backbone` leaves unread, and stays frozen: an embedder has no use for it. Valid under causal attention only, where
h_{t-1} has not seen x_t.

Logits are made for a slice of the tokens at a time, with their gradient: (N, H) is what stays, and logits of all tokens
never stand together. Cost: 2 products of N x V x H, and two more where W itself is trained, which are made in the
backward; a pass without gradients makes one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmembed.backbones.loading import resolve_backbone
from mmembed.errors import ConfigError

if TYPE_CHECKING:
    from mmembed.backbones.family import Family

CELLS = 2**24  # logits of a slice: 64 MB in float32
# Decoders whose loss was compared with that of transformers' own model (tests/unit/test_output_embedding.py).
KNOWN_DECODERS = (
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma",
    "gemma3_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
)
_NAME = "lm_head.weight"


class OutputEmbedding(nn.Module):
    """Its weight is a buffer that no checkpoint holds.

    Args:
        weight: (V, H), or None where it is the input embedding.
    """

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor | None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: Tensor, ids: Tensor, predicted: Tensor, tied: nn.Module) -> tuple[Tensor, Tensor]:
        """What predicting costs, an input.

        Args:
            hidden: (B, T, H) of right-padded rows.
            ids: (B, T).
            predicted: (B, T) bool, true on the tokens to predict; the first of a row never counts.
            tied: the input embedding.

        Returns:
            (B,) sums of -log p, float32 or above; (B,) long, how many tokens that are.
        """
        ahead = predicted[:, 1:]  # (B, T - 1)
        weight: Tensor = cast("Tensor", tied.weight) if self.weight is None else self.weight
        losses = token_losses(hidden[:, :-1][ahead], weight, ids[:, 1:][ahead])  # (N,)
        nll = losses.new_zeros(ahead.shape).masked_scatter(ahead, losses).sum(1)
        return nll, ahead.sum(1)

    def memory(self, tokens: int, tied: Tensor, size: int) -> tuple[float, float]:
        """Bytes that predicting `tokens` keeps for the backward pass, and holds at its height before that.

        Args:
            tied: the input embedding's weight, which may have no contents.
            size: bytes a value that products are computed in.
        """
        weight = tied if self.weight is None else self.weight
        vocabulary, width = weight.shape
        states = 2 if weight.requires_grad else 1  # the gradient of the states; and they themselves
        copied = weight.numel() * size if weight.element_size() != size else 0
        logits = (
            min(tokens, max(1, CELLS // vocabulary)) * vocabulary * 8.0
        )  # in 32 bits, and what logsumexp makes of it
        return float(tokens * width * size * states), copied + logits


def check_predictable(
    family: Family, name_or_path: str, revision: str | None = None, what: str = "objective 'captioning'"
) -> None:
    """Refuses a backbone whose tokens cannot be predicted from the hidden states of an embedder. Reads no weights, and
    looks for the output embedding only in files that are on this machine.

    Args:
        what: needs it, for messages.

    Raises:
        ConfigError: attention is bidirectional, the logits of this decoder are not known to be W h, or there is no
            output embedding beside the backbone.
    """
    text = family.config.get_text_config()
    if not family.causal:
        raise ConfigError(
            f"{what}: under bidirectional attention a token has seen those it is to predict; set "
            "model.attention: causal, or remove it"
        )
    if text.model_type not in KNOWN_DECODERS or vars(text).get("final_logit_softcapping") is not None:
        raise ConfigError(
            f"{what}: how the decoder '{text.model_type}' makes logits of hidden states has not been "
            f"compared with its own loss; use one of {', '.join(KNOWN_DECODERS)}, or remove it"
        )
    if not family.config.tie_word_embeddings:
        _find(name_or_path, revision, download=False, what=what)


def check_output_embedding(name_or_path: str, revision: str | None, what: str) -> None:
    """Raises ConfigError where the files of an untied backbone are on this machine and hold no output embedding."""
    _find(name_or_path, revision, download=False, what=what)


def load_output_embedding(
    family: Family,
    name_or_path: str,
    revision: str | None,
    dtype: torch.dtype,
    what: str = "objective 'captioning'",
) -> OutputEmbedding:
    """The output embedding of a backbone that `check_predictable` accepts. Raises ConfigError as that."""
    from safetensors import safe_open

    check_predictable(family, name_or_path, revision, what)
    if family.config.tie_word_embeddings:
        return OutputEmbedding(None)
    found = _find(name_or_path, revision, download=True, what=what)
    if found is None:
        raise ConfigError(f"{what}: no safetensors of '{name_or_path}' with its output embedding are here")
    file, name = found
    with safe_open(file, "pt") as tensors:
        return OutputEmbedding(tensors.get_tensor(name).to(dtype))


def outline_output_embedding(family: Family, dtype: torch.dtype) -> OutputEmbedding:
    """The same without contents, for a plan."""
    text = family.config.get_text_config()
    tied = family.config.tie_word_embeddings
    return OutputEmbedding(None if tied else torch.empty(text.vocab_size, text.hidden_size, dtype=dtype, device="meta"))


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target (N,), float32 or above.

    Args:
        hidden: (N, H), each of the place in front of its target.
        weight: (V, H).
        targets: (N,) long.

    >>> token_losses(torch.zeros(2, 3), torch.randn(4, 3), torch.tensor([1, 3]))  # log 4
    tensor([1.3863, 1.3863])
    """
    wanted = [torch.is_grad_enabled() and one.requires_grad for one in (hidden, weight)]
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    losses: Tensor = _TokenLosses.apply(hidden, weight, targets, dtype, *wanted)
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        of_hidden_wanted: bool,
        of_weight_wanted: bool,
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)  # (N,)
        of_hidden = torch.empty_like(hidden) if of_hidden_wanted else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for rows in _slices(len(targets), len(weight)):
                logits = (hidden[rows].to(dtype) @ matrix.T).to(wide)  # (n, V)
                losses[rows] = _to_gradient(logits, targets[rows], keep=of_hidden_wanted)
                if of_hidden is not None:
                    of_hidden[rows] = (logits.to(dtype) @ matrix).to(hidden.dtype)
        ctx.save_for_backward(of_hidden, *((hidden, weight, targets) if of_weight_wanted else ()))
        ctx.dtype = dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_losses = gradients[0].unsqueeze(1)  # (N, 1)
        of_hidden, *inputs = ctx.saved_tensors
        made = None if of_hidden is None else (of_losses * of_hidden).to(of_hidden.dtype)
        learned = None
        if inputs:
            hidden, weight, targets = inputs
            learned = _of_weight(hidden, weight, targets, of_losses, ctx.dtype)
        return made, learned, None, None, None, None


def _of_weight(hidden: Tensor, weight: Tensor, targets: Tensor, of_losses: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a trained output embedding (V, H): a weighted sum over tokens, so it waits for the weights."""
    total = torch.zeros_like(weight)
    matrix = weight.to(dtype)
    for rows in _slices(len(targets), len(weight)):
        states = hidden[rows].to(dtype)
        logits = (states @ matrix.T).to(of_losses.dtype)  # (n, V)
        _to_gradient(logits, targets[rows], keep=True)
        total += logits.mul_(of_losses[rows]).to(dtype).T @ states
    return total


def _to_gradient(logits: Tensor, targets: Tensor, keep: bool) -> Tensor:
    """-log p (n,) of the targets; where `keep`, logits (n, V) become its gradient with respect to them, in place."""
    normaliser = logits.logsumexp(1, keepdim=True)  # (n, 1)
    column = targets.unsqueeze(1)
    losses = (normaliser - logits.gather(1, column)).squeeze(1)
    if keep:
        logits.sub_(normaliser).exp_()
        logits.scatter_add_(1, column, logits.new_full((1, 1), -1.0).expand(len(targets), 1))
    return losses


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CELLS // max(1, vocabulary))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _find(name_or_path: str, revision: str | None, download: bool, what: str) -> tuple[str, str] | None:
    """The safetensors file of an untied output embedding, and its name there; None where no weights are at hand.

    Raises:
        ConfigError: there are weights, and no output embedding among them.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def local(file: str) -> str | None:
        return cached_file(
            resolve_backbone(name_or_path),
            file,
            revision=revision,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    index, whole = local("model.safetensors.index.json"), None
    if index is not None:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    elif (whole := local("model.safetensors")) is not None:
        with safe_open(whole, "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), "model.safetensors")
    else:
        return None
    found = [name for name in files if name == _NAME or name.endswith("." + _NAME)]
    if len(found) != 1:
        raise ConfigError(
            f"{what}: '{name_or_path}' does not tie its output embedding to the input's, and holds {len(found)} "
            f"tensors called '{_NAME}'. An embedder is saved without it: start from the language model that it was "
            "made of, or remove it"
        )
    file = local(files[found[0]])
    return None if file is None else (file, found[0])
