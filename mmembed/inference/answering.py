"""The order of a list's documents as the model writes it, token by token: decoding, instead of reading attention.

BlockRank (arXiv 2510.05396) ranks as well by attention, without a token being decoded; decoding tells what
next-token prediction has learned. The keys and values of the list's blocks are those of the reading that also gives
the shares; each further token sees all of them and costs a pass of one token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from mmembed.errors import MmembedError
from mmembed.generation.orders import Order
from mmembed.inference.lists import read_list
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.preprocess import ModelInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@torch.inference_mode()
def answer(model: EmbeddingModel, inputs: ModelInputs, tokenizer: Any, limit: int) -> tuple[str, Tensor]:
    """The text that the model writes behind a list, up to its "]" or `limit` tokens, greedily; and the shares (N,).

    Raises:
        MmembedError: the model was given no output embedding.
    """
    from transformers import DynamicCache

    if model.output_embedding is None:
        raise MmembedError("decoding needs the backbone's output embedding, which this model was loaded without")
    read = read_list(model, inputs, to_the_end=True)
    hidden = read.hidden
    assert hidden is not None and inputs.tail is not None, "it went to the end"
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(read.attended):
        cache.update(key, value, layer)
    weight = model.output_embedding.weight
    weight = cast("Tensor", model.base.get_input_embeddings().weight) if weight is None else weight  # (V, H)
    position = model.list_head.offset + len(inputs.tail.ids)
    written: list[int] = []
    text = ""
    while len(written) < limit:
        written.append(int((weight @ hidden[0, -1].to(weight.dtype)).argmax()))
        text = tokenizer.decode(written)
        if "]" in text or written[-1] == tokenizer.eos_token_id:
            break
        ids = torch.tensor([written[-1:]], device=hidden.device)
        hidden = model.base(
            input_ids=ids,
            position_ids=model.one_position(position + len(written) - 1, ids.device),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
    return text.split("]")[0], read.shares


def completed(order: Order, shares: Sequence[float]) -> list[int]:
    """All documents: those that an answer names, the others by falling share."""
    named, others = order.places[: order.named], order.places[order.named :]
    return [*named, *sorted(others, key=lambda place: -shares[place])]
