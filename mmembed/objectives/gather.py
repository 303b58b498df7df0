"""Rows of all processes, with gradients. One padded all-gather forward, one all-reduce backward.

`d loss_r / d rows_s` exists for every pair of processes, so the backward sums the gradients of all processes and each
keeps its own slice; averaging parameter gradients over processes afterwards gives the gradient of the mean loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmembed.embeddings import Embeddings


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_counts(count: int, device: torch.device) -> list[int]:
    """The count of each process."""
    size = world()[1]
    if size == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(item) for item in counts]


def gather_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """(N, ...) of each process, N = counts[rank] -> (sum(counts), ...), in the order of ranks, with gradients."""
    if len(counts) == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor, counts)
    return gathered


def gather_embeddings(embeddings: Embeddings, counts: list[int]) -> Embeddings:
    """Embeddings of all processes, of the last layer; sequences of vectors are padded to the longest."""
    vectors, mask = embeddings.vectors, embeddings.mask
    if len(counts) == 1:
        return Embeddings(vectors, mask)
    if mask is not None:
        longest = max(gather_counts(vectors.shape[1], vectors.device))
        missing = longest - vectors.shape[1]
        vectors = torch.nn.functional.pad(vectors, (0, 0, 0, missing))  # (N, T, E)
        mask = gather_rows(torch.nn.functional.pad(mask, (0, missing)).long(), counts).bool()  # (C, T)
    return Embeddings(gather_rows(vectors, counts), mask)


def from_first(tensor: Tensor) -> Tensor:
    """The first process's values in all of them, in place: for numbers that must not differ by a rounding."""
    if world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.counts[: world()[0]])
        return gradient[start : start + ctx.counts[world()[0]]], None
