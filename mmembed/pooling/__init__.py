"""Pooling: hidden states of a sequence -> one vector (or, for late interaction, one vector a token).

A pooling sees hidden states (B, T, H) and the pool mask (B, T), true on the tokens that count: neither padding nor
instruction. Everything goes by the mask, so padding side and amount never change a result. Sums run in float32.
One file per pooling; `POOLINGS.build("mean", hidden_size=H)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from mmembed.registry import Registry


class Pooling(nn.Module):
    """Base of the poolings. `embedding_size` is the size of the vectors that come out.

    `unset` says what None of an option stands for, where that is one value: a saved pooling that names it and a config
    that leaves it out are the same.
    """

    name: ClassVar[str]
    multi_vector: ClassVar[bool] = False
    unset: ClassVar[Mapping[str, Any]] = {}
    embedding_size: int

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding_size = hidden_size

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, T, H), mask (B, T) bool -> (B, E) float32, or (B, T, E) where `multi_vector`."""
        raise NotImplementedError


POOLINGS: Registry[Pooling] = Registry("mmembed.pooling", Pooling, given=("hidden_size",))


def masked_mean(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens in float32: hidden (B, T, H), weights (B, T) -> (B, H)."""
    weights = weights.float()
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would sum in bfloat16
        total = torch.bmm(weights.unsqueeze(1), hidden.float()).squeeze(1)  # (B, H)
    return total / weights.sum(1, keepdim=True)
