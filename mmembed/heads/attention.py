"""What the query attends to when all documents stand before it: the score of an in-context reranker.

S_n = sum_{d in n} mean_{h, r} softmax_d( q_hr . k_d / sqrt(D) )

The share of document n in the attention of the last tokens of the prompt, at one layer (BlockRank, arXiv 2510.05396;
`mmembed.backbones.block_attention` says what sees what). It has no weights: it is trained by a loss over S,
L_aux = -log( sum_{k in pos} e^{S_k / tau} / sum_k e^{S_k / tau} ) with tau .05, which is objective `ranking` with loss
`infonce`, beside next-token prediction of the answer (objective `answer`). Reranking runs the layers up to that one,
and decodes nothing.

When: many documents a query, ranked in one pass at linear cost; `yes_no` judges each alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.heads import Head

SHARE = 0.625  # of the layers below the one that is read: 20 of 32 in the paper


class Attention(Head):
    """The share of the query's attention that a document has.

    Args:
        layer: whose attention is read, from 1; None: at five eighths of the depth (20 of Mistral's 32).
        offset: position of the last block, the same for lists of any length; 8192 in the paper, 16384 in its code. It
            has to be one that the backbone knows.
        kernel: of lists in one sequence: "sdpa" computes rows behind a shared block; "flex" one mask in flex_attention,
            for GPUs.
    """

    name = "attention"
    logits = 1
    lists = True

    def __init__(
        self,
        hidden_size: int,
        layer: Annotated[int, Field(ge=1)] | None = None,
        offset: Annotated[int, Field(ge=1)] = 8192,
        kernel: Literal["sdpa", "flex"] = "sdpa",
    ) -> None:
        super().__init__(hidden_size, trained=None)
        self.layer, self.offset, self.kernel = layer, offset, kernel

    def forward(self, hidden: Tensor) -> Tensor:
        raise ConfigError("head 'attention' reads lists of documents, which prompt in_context writes; take that")

    def of(self, depth: int) -> int:
        """The layer that is read, of so many. Raises ConfigError where there is none such."""
        layer = max(1, round(SHARE * depth)) if self.layer is None else self.layer
        if layer > depth:
            raise ConfigError(f"head 'attention': layer {layer} of a backbone with {depth}; name a lower one")
        return layer
