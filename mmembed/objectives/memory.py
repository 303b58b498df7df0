"""What objectives remember between steps, in buffers: rows of numbers by key, and a queue of vectors.

Both are saved and resumed with the objective, and equal in all processes as long as these are given the same news.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class KeyedRows(nn.Module):
    """A table that grows: (n,) int64 keys and (n, width) numbers. Looking N keys up is N look-ups in a dictionary."""

    keys: Tensor
    rows: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(0, dtype=torch.long))
        self.register_buffer("rows", torch.zeros(0, width))
        self._place: dict[int, int] | None = {}

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) keys -> (N, width) rows, (N,) bool whether the key is known; unknown rows are 0."""
        places = torch.tensor([self._places().get(key, -1) for key in keys.tolist()], dtype=torch.long)
        places = places.to(self.rows.device)
        known = places >= 0
        found = self.rows.new_zeros(len(keys), self.rows.shape[1])
        found[known] = self.rows[places[known]]
        return found, known

    def put(self, keys: Tensor, rows: Tensor) -> None:
        """(N,) keys, (N, width) rows; a key that comes several times gets the mean of its rows."""
        distinct, of = torch.unique(keys, return_inverse=True)
        summed = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, of, rows)
        means = (summed / torch.bincount(of).unsqueeze(1)).to(self.rows.dtype)  # (n, width)
        index = self._places()
        places = torch.tensor([index.get(key, -1) for key in distinct.tolist()], dtype=torch.long).to(keys.device)
        known = places >= 0
        self.rows[places[known]] = means[known]
        index.update({key: len(self.keys) + number for number, key in enumerate(distinct[~known].tolist())})
        self.keys, self.rows = torch.cat([self.keys, distinct[~known]]), torch.cat([self.rows, means[~known]])

    def _places(self) -> dict[int, int]:
        if self._place is None:  # tensors were loaded
            self._place = {key: number for number, key in enumerate(self.keys.tolist())}
        return self._place

    def _apply(self, fn: Any, recurse: bool = True) -> KeyedRows:
        super()._apply(fn, recurse)
        if self.rows.dtype in (torch.bfloat16, torch.float16):  # an engine's: small steps would be lost in these
            self.rows = self.rows.float()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("keys", "rows"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(saved.shape))
        self._place = None
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Queue(nn.Module):
    """The last `size` vectors that were put in, first in, first out, with the keys of their contents.

    Args:
        size: rows. embedding_size: of a vector.
    """

    vectors: Tensor
    keys: Tensor
    seen: Tensor

    def __init__(self, size: int, embedding_size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, embedding_size))
        self.register_buffer("keys", torch.zeros(size, 2, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    def read(self, size: int) -> tuple[Tensor, Tensor]:
        """What is in it: unit vectors (M, size) of the first `size` dimensions, keys (M, 2)."""
        count = min(int(self.seen), len(self.vectors))
        return functional.normalize(self.vectors[:count, :size], dim=-1), self.keys[:count]

    def put(self, vectors: Tensor, keys: Tensor) -> None:
        """(N, E) vectors, (N, 2) keys; of more than the queue holds, the last ones."""
        size, start = len(self.vectors), int(self.seen)
        kept = min(len(vectors), size)
        places = (start + torch.arange(len(vectors), device=self.keys.device)[-kept:]) % size
        self.vectors[places] = vectors[-kept:].to(self.vectors.dtype)
        self.keys[places] = keys[-kept:]
        self.seen.add_(len(vectors))
