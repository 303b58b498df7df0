"""Labels of one local batch: which document belongs to which query, how relevant it is, and what it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchLabels:
    """Q local queries, D local documents.

    owner: (D,) long, the local query of each document.
    relevance: (D,) float >= 0, graded, towards its owner.
    score: (D,) float, a teacher's or retriever's score; NaN where absent.
    document_keys: (D,) int64, equal for equal contents. query_keys: (Q,) int64, from the same hash.
    positive_keys: (Q, P) int64, contents known to be relevant to each query, drawn into the batch or not; rows with
        fewer repeat one.
    in_batch: whether other queries' documents are negatives.
    """

    owner: Tensor
    relevance: Tensor
    score: Tensor
    document_keys: Tensor
    query_keys: Tensor
    positive_keys: Tensor
    in_batch: bool = True
    task: str = "retrieval"
    source: str = ""

    def to(self, device: torch.device | str) -> BatchLabels:
        """The same labels on another device."""
        tensors: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)
