"""Softmax over the rows of a score matrix whose diagonal holds the positives, for the objectives over pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def log_shares(scores: Tensor, valid: Tensor) -> Tensor:
    """log softmax of (..., C) over the valid candidates; very low, but finite, on the others."""
    floor = torch.finfo(scores.dtype).min / 2  # not -inf: a row without another candidate must give 0, not NaN
    return scores.masked_fill(~valid, floor).log_softmax(-1)


def info_nce(scores: Tensor, same: Tensor, smoothing: float = 0.0) -> Tensor:
    """(N, C) scores, positive of row i in column i -> (N,) losses.

    Args:
        same: (N, C) bool, columns that are no negatives of the row.
        smoothing: share of the target that all valid columns have in common.

    >>> info_nce(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2).bool())
    tensor([0.3133, 0.3133])
    """
    valid = ~same | torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)  # (N, C)
    shares = log_shares(scores, valid)  # (N, C)
    loss = -shares.diagonal()  # (N,)
    if smoothing:
        uniform = -(shares * valid).sum(1) / valid.sum(1)  # (N,)
        loss = (1 - smoothing) * loss + smoothing * uniform
    return loss


def both_ways(scores: Tensor, same: Tensor, smoothing: float = 0.0) -> Tensor:
    """(N, N) scores -> (N,), the mean of `info_nce` of rows and of columns."""
    return (info_nce(scores, same, smoothing) + info_nce(scores.T, same.T, smoothing)) / 2
