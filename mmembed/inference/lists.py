"""A list of documents read without gradients, in parts: block 0, some documents at a time, and the last block.

What is wanted of the documents are their keys and values in the layers up to the one that is read, in that layer their
keys (`mmembed.backbones.block_attention`). Documents do not see each other, so any number of them may go through the
backbone at a time; the last block goes behind all of them, as a row behind a prefix:

block 0        (P tokens)            as of batches that share a prefix
documents      (up to `budget`)      behind block 0, longest first, each part as wide as its longest
last block     (L tokens)            behind everything

A list of one part goes in one sequence: each pass of few tokens costs some milliseconds. Threads that take parts beside
each other gain nothing (docs/log.md).

Time is linear in the documents as long as the states of a part stay in the processor's cache; in one sequence those of
200 documents of 160 tokens (16 MB a copy) leave it between two operations. Memory: keys and values of the documents'
tokens without padding, and the states of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmembed.backbones.block_attention import LastPart, Part, Read, position_ids
from mmembed.backbones.shared_prefix import Prefix
from mmembed.models.embedding_model import EmbeddingModel, media_of
from mmembed.preprocess import ModelInputs

CPU_TOKENS = 8192  # of a part: up to there a document of a list costs the same, in longer sequences a third more
TOKENS = 16384  # on accelerators


@dataclass(frozen=True)
class ListRead:
    """What reading gives.

    Attributes:
        shares: (N,) of the documents.
        hidden: (1, L, H) last hidden states of the last block, where it went to the end.
        attended: keys and values (1, G, S, D) of all blocks in each layer, without padding, where it went to the end.
    """

    shares: Tensor
    hidden: Tensor | None
    attended: list[tuple[Tensor, ...]]


@torch.inference_mode()
def read_list(
    model: EmbeddingModel, inputs: ModelInputs, budget: int | None = None, to_the_end: bool = False
) -> ListRead:
    """Reads the documents of a list.

    Args:
        budget: padded tokens of documents that go through the backbone at a time, which change no result; a longer
            document goes alone. Of documents with pictures all go at once. None: 8192 on a CPU, 16384 elsewhere.
        to_the_end: also what decoding needs; else nothing is computed above the layer that is read.

    Raises:
        MmembedError: a document does not end before the last block begins.
    """
    head, tail, prefix = model.list_head, inputs.tail, inputs.shared
    assert tail is not None, "of a list"
    tensors, pool_mask, _ = model.given(inputs)
    positions, real = model.list_layout(tensors, pool_mask, inputs)  # (..., N, P + T) and (N, T)
    ids, media = tensors["input_ids"], media_of(tensors)
    budget = budget or (CPU_TOKENS if ids.device.type == "cpu" else TOKENS)
    parts = [torch.arange(len(ids), device=ids.device)] if media else list(divided(real.sum(1), budget))
    if len(parts) == 1 and not to_the_end:
        blocks, _ = model.run_list(tensors, pool_mask, inputs, stop=True)
        assert blocks.shares is not None, "every layer follows"
        return ListRead(blocks.shares[: len(inputs)], None, [])
    layer = head.of(model.depth)
    end = (model.depth if to_the_end else layer) - 1
    first = model.read_prefix(ids[0, :prefix])
    before = prefix + int(real.sum())  # tokens in front of the last block
    room = _room(first, end, before + len(tail.ids), keys_alone=not to_the_end)

    start = prefix
    for part in parts:
        width = ids.shape[1] if media else prefix + int(real[part].sum(1).max())
        documents = Part(model.config, first, real[part, : width - prefix], room, start, end)
        start = documents.places.stop
        sequence, places = (one[..., part, prefix:width].flatten(-2).unsqueeze(-2) for one in (ids, positions))
        _run(model, documents, sequence, places, media)

    seen = [[one[:, :, :before] for one in states] for states in room]
    everything = Prefix(tuple((states[0], states[-1]) for states in seen), ())  # values of the last layer are not read
    last = torch.tensor([tail.ids], device=ids.device)  # (1, L)
    whole = torch.ones_like(last, dtype=torch.bool)
    order = torch.cat(parts)  # of the documents' keys
    block = LastPart(
        *(model.config, everything, whole, room, before, None if to_the_end else end),
        documents=real[order], prefix=prefix, layer=layer, signals=tail.signals,
    )  # fmt: skip
    hidden = _run(model, block, last, position_ids(positions[..., :1, :0], len(tail.ids), head.offset), {})
    assert block.shares is not None, "every layer follows"
    shares = torch.empty_like(block.shares)
    shares[order] = block.shares
    return ListRead(shares[: len(inputs)], hidden, room if to_the_end else [])


def _run(model: EmbeddingModel, part: Part, ids: Tensor, places: Tensor, media: dict[str, Any]) -> Tensor | None:
    """Hidden states (1, S, H) of a part, or None where it ends below the last layer."""
    try:
        return model.run_behind(part, ids, places, media)[0]
    except Read:
        return None


def divided(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Documents of (N,) tokens, the longest first, as many at a time as take up to `budget` with their padding."""
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        count = max(1, budget // max(1, int(lengths[order[0]])))
        yield order[:count]
        order = order[count:]


def _room(first: Prefix, end: int, size: int, keys_alone: bool) -> list[tuple[Tensor, ...]]:
    """Keys and values (1, G, size, D) of layers up to `end`, those of block 0 in their places."""
    room: list[tuple[Tensor, ...]] = []
    for layer, states in enumerate(first.attended[: end + 1]):
        kept = states[:1] if keys_alone and layer == end else states
        room.append(tuple(one.new_empty(*one.shape[:2], size, one.shape[3]) for one in kept))
        for whole, own in zip(room[-1], kept, strict=True):
            whole[:, :, : own.shape[2]] = own
    return room
