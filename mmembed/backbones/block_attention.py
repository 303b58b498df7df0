"""Attention for a list: a query, N documents, and the query again, in time linear in N (BlockRank, arXiv 2510.05396).

block 0      instruction and query       sees itself, causally
block 1..N   a document each             sees block 0 and itself, causally; no other document
block N+1    the query again, the answer sees all blocks, and itself, causally

Positions: block 0 from 0; every document goes on behind block 0, so that none is before another; the last block from
an offset. The first N + 1 blocks are rows behind a shared prefix (`mmembed.backbones.shared_prefix`): the last one
stands behind them in the same sequence of P + N * T + L tokens: training, engines and checkpoints see nothing new.
Without gradients blocks go through the backbone in parts (`Part`), so that the states of a long list need not be
anywhere at once (`mmembed.inference.lists`).

Which documents the query reads is its score of them: at one layer, of R tokens (signals) of the last block,

z_hrd = q_hr . k_d / sqrt(D)                          d runs over the documents' tokens alone
S_n   = sum_{d in n} mean_{h, r} softmax_d(z_hr)_d    so S sums to 1

As in the released code the heads are averaged after the softmax, and signals too (the paper adds those). Padding takes
no part. Logits carry the factor 1 / sqrt(D) on every path; the released SDPA path leaves it out.

Cost of the last block: L (P + N * T) scores. On a GPU `flex_attention` computes the whole list in one kernel, of a mask
that says which blocks see which (`kernel: flex`); the same numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.backbones.shared_prefix import Kernel, Prefix, SharedPrefix, attend_behind, masked_attention
from mmembed.errors import MmembedError


class Blocks(SharedPrefix):
    """How one sequence is divided; goes to every attention layer as the argument `shared_prefix`.

    Args:
        config: of the decoder.
        tokens: P, of block 0.
        real: (N, T) bool, the documents' tokens; false on padding.
        tail: L, tokens of the last block.
        layer: whose attention is read, from 1.
        signals: places in the last block, of the tokens whose attention that is.
        kernel: "sdpa", or "flex".
        stop: raise `Read` there, where nothing else is wanted of the pass.

    Attributes:
        shares: (N,) S of each document, once the layer was computed.
    """

    def __init__(
        self,
        config: Any,
        tokens: int,
        real: Tensor,
        tail: int,
        layer: int,
        signals: tuple[int, ...],
        kernel: str = "sdpa",
        stop: bool = False,
    ) -> None:
        super().__init__(config, tokens, len(real))
        self.real, self.tail, self.layer, self.signals = real, tail, layer, signals
        self.kernel, self.stop = kernel, stop
        self.shares: Tensor | None = None
        self._seen: Tensor | None = None
        self._pattern: Any = None

    @property
    def seen(self) -> Tensor:
        """(L, P + N * T + L) bool: what the last block sees."""
        if self._seen is None:
            device = self.real.device
            front = torch.cat([torch.ones(self.tokens, dtype=torch.bool, device=device), self.real.flatten()])
            itself = torch.ones(self.tail, self.tail, dtype=torch.bool, device=device).tril()
            self._seen = torch.cat([front.expand(self.tail, -1), itself], dim=1)
        return self._seen

    @property
    def pattern(self) -> Any:
        """What sees what, for flex attention."""
        if self._pattern is None:
            from torch.nn.attention.flex_attention import create_block_mask

            rows, length = self.real.shape
            size = [self.tokens, *[length] * rows, self.tail]
            device = self.real.device
            block = torch.arange(rows + 2, device=device).repeat_interleave(torch.tensor(size, device=device))  # (S,)
            real = functional.pad(self.real.flatten(), (self.tokens, self.tail), value=True)  # (S,)
            seen = visible(block, real, rows + 1)
            self._pattern = create_block_mask(seen, None, None, len(block), len(block), device=str(device))
        return self._pattern


class Read(Exception):
    """All that is wanted of a pass was computed; it needs not go on."""


class Part(SharedPrefix):
    """Some documents of a list, or its last block, behind blocks that went through the backbone before. No gradients.

    Args:
        known: the blocks that these see: block 0; of the last one, all.
        real: (B, T) bool; false on padding, which is not kept.
        room: of each layer, keys and values (1, G, S, D) of the whole list, or of a layer whose values nobody needs its
            keys; this part's own are written there.
        start: place of its first token there.
        end: layer, from 0, where the pass ends (`Read`): its attention is not computed.
    """

    def __init__(
        self, config: Any, known: Prefix, real: Tensor, room: list[tuple[Tensor, ...]], start: int, end: int | None
    ) -> None:
        super().__init__(config, known.attended[0][0].shape[2], len(real), known)
        self.room, self.end = room, end
        self.places = slice(start, start + int(real.sum()))
        self.kept = slice(None) if real.all() else real.flatten()  # to copy by a mask takes twice as long

    def note(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        for whole, own in zip(self.room[layer], (key, value), strict=False):
            whole[:, :, self.places] = own[:, :, self.kept]
        if layer == self.end:
            raise Read


class LastPart(Part):
    """The last block of a list, and what it attends to at one layer.

    Args:
        documents: (N, T) bool, whose tokens stand behind block 0 without their padding.
        prefix: P, tokens of block 0.
        layer, signals: as of `Blocks`.

    Attributes:
        shares: (N,), once the layer was computed.
    """

    def __init__(self, *part: Any, documents: Tensor, prefix: int, layer: int, signals: tuple[int, ...]) -> None:
        super().__init__(*part)
        self.documents, self.prefix, self.layer, self.signals = documents, prefix, layer, signals
        self.shares: Tensor | None = None

    def note(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer == self.layer - 1:
            keys = self.room[layer][0][0, :, self.prefix : self.tokens]  # (G, S, D)
            found = read_logits(query[0, :, list(self.signals)], keys, scaling)  # (H, R, S)
            logits = found.new_zeros(*found.shape[:2], self.documents.numel())
            logits[..., self.documents.flatten()] = found
            self.shares = document_shares(logits, self.documents)
        super().note(layer, query, key, value, scaling)


def attend_blocks(
    blocks: Blocks,
    layer: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    kernel: Kernel,
    **options: Any,
) -> Tensor:
    """query (1, H, P + N * T + L, D), key and value (1, G, P + N * T + L, D) -> (1, P + N * T + L, H, D).

    Args:
        layer: the number of this layer, from 0.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    front = query.shape[2] - blocks.tail
    last = query[:, :, front:]
    if layer == blocks.layer - 1:
        signals = last[0, :, list(blocks.signals)]  # (H, R, D)
        # computed again where a checkpointed layer is, or its graph would be another one
        shares = document_shares(read_logits(signals, key[0, :, blocks.tokens : front], scaling), blocks.real)
        blocks.shares = shares if blocks.shares is None else blocks.shares
        if blocks.stop:
            raise Read
    if blocks.kernel == "flex":
        blocks.calls += 1
        return _attend_flex(blocks, query, key, value, dropout, scaling)
    own, keys, values = (tensor[:, :, :front] for tensor in (query, key, value))
    head = attend_behind(blocks, own, keys, values, dropout, scaling, kernel, **options)  # (1, P + N * T, H, D)
    tail = masked_attention(last, key, value, blocks.seen, dropout, scaling)  # (1, H, L, D)
    return torch.cat([head, tail.transpose(1, 2)], dim=1)


def _attend_flex(blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
    if dropout:
        raise MmembedError("head 'attention': flex attention has no dropout; set attention_dropout 0, or kernel: sdpa")
    found = _flex(query.device.type)(
        query, key, value, block_mask=blocks.pattern, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return cast("Tensor", found).transpose(1, 2)


@cache
def _flex(device: str) -> Any:
    """Compiled where that makes one kernel of it; elsewhere it is the plain formula, for comparison."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def read_logits(signals: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Signals (H, R, D) and keys (G, S, D) of H / G heads each -> (H, R, S), float32."""
    grouped = signals.float().unflatten(0, (len(keys), -1)).flatten(1, 2)  # (G, H / G * R, D)
    logits = grouped @ keys.float().mT * scaling  # (G, H / G * R, S)
    return logits.unflatten(1, (-1, signals.shape[1])).flatten(0, 1)


def document_shares(logits: Tensor, real: Tensor) -> Tensor:
    """S: raw attention logits (H, R, N * T) over the documents' tokens, real (N, T) -> (N,), which sum to 1."""
    hidden = ~real.flatten()
    attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)  # (H, R, N * T)
    return attention.mean(dim=(0, 1)).unflatten(0, real.shape).sum(dim=1)


def position_ids(prefix: Tensor, tail: int, offset: int) -> Tensor:
    """Positions (..., P + N * T) of block 0 and the documents -> with the last block's, (..., P + N * T + L)."""
    last = torch.arange(offset, offset + tail, device=prefix.device).expand(*prefix.shape[:-1], -1)
    return torch.cat([prefix, last], dim=-1)


def visible(block: Tensor, real: Tensor, last: int) -> Any:
    """The pattern as a `mask_mod` of flex attention: whether a query's token sees a key's.

    Args:
        block: (S,) the block of each token. real: (S,) false on padding. last: the number of the last block.
    """

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = block[query], block[key]
        itself = (of_query == of_key) & (query >= key)
        others = (of_key == 0) | (of_query == last)
        return real[key] & (itself | (others & (of_key < of_query)))

    return mask
