"""Labels of pairs as numbers: what two label paths have in common, and which of the known classes a path is.

A label is the path of names from the top of a tree down to it (a plain label is one name); a pair has several. Names
are hashes (`mmembed.data.labels.label_keys`), so that processes exchange integers. Names are compared as written.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmembed.data.labels import name_key
from mmembed.errors import ConfigError

FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no bit of a key is lost; products wrap around


def path_keys(levels: Tensor) -> Tensor:
    """Hashes of the names on each level (..., D), 0 beyond the last -> one hash a path (...); 0 where there is none."""
    found = torch.zeros_like(levels[..., 0])
    for names in levels.unbind(-1):
        found = torch.where(names == 0, found, found * FACTOR + names)
    return found


def single_path_keys(labels: Tensor, objective: str, source: str) -> Tensor:
    """(N, L, D) as `BatchLabels.label_keys` -> (N,) hashes of the one label of each pair.

    Raises ConfigError, naming objective and source, where a pair has none or several.
    """
    counts = (labels[..., 0] != 0).sum(1)
    if (counts != 1).any():
        found = int(counts[counts != 1][0])
        raise ConfigError(
            f"objective '{objective}' takes one label a record, a record of source '{source}' has {found}"
        )
    return path_keys(labels[:, 0])


def _path_key(path: tuple[str, ...]) -> int:
    """What `path_keys` gives of the path, in Python's numbers."""
    found = 0
    for name in path:
        found = found * FACTOR + name_key(name)
    return (found + 2**63) % 2**64 - 2**63


def tree_similarities(labels: Tensor) -> tuple[Tensor, Tensor]:
    """How much the labels of two samples agree, one view of the tree at a time.

    A view is a run of neighbouring levels: each level alone, then two that follow each other, up to whole paths; D
    levels have V = D (D + 1) / 2. In a view a sample is the set S of the names on that run, of all its paths that reach
    so deep, and two samples agree by |S_i and S_j| / |S_i or S_j| (Jaccard).

    Args:
        labels: (N, L, D) int64, hashes of names, 0 beyond a path's last level.

    Returns:
        (V, N, N) float, 0 where neither has a name in the view; (V, N, N) bool, where one has.
    """
    similarities, present = [], []
    for length in range(1, labels.shape[2] + 1):
        for first in range(labels.shape[2] - length + 1):
            run = labels[..., first : first + length]  # (N, L, length)
            keys = path_keys(run).masked_fill(run[..., -1] == 0, 0)  # (N, L)
            both, either = _overlap(keys)
            similarities.append(both / either.clamp_min(1))
            present.append(either > 0)
    return torch.stack(similarities), torch.stack(present)


def _overlap(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L) int64 -> sizes (N, N) of what two rows have in common and of what they have together; 0 is no element."""
    distinct, place = torch.unique(keys, return_inverse=True)  # (U,), (N, L)
    has = torch.zeros(len(keys), len(distinct), device=keys.device).scatter_(1, place, 1.0)  # (N, U)
    has = has[:, distinct != 0]
    size, both = has.sum(1), has @ has.T
    return both, size[:, None] + size[None, :] - both


class Classes:
    """Known label paths, by number.

    >>> from mmembed.data.labels import label_keys
    >>> known = Classes([("hotel", "book"), ("taxi",)])
    >>> known.find(path_keys(label_keys([[("taxi",)], [("hotel",)], [("hotel", "book")]]))).flatten().tolist()
    [1, -1, 0]
    """

    def __init__(self, paths: Iterable[tuple[str, ...]]) -> None:
        keys = [_path_key(path) for path in paths]  # a million of them take a second
        self._keys, self._numbers = torch.tensor(keys, dtype=torch.long, device="cpu").sort()

    def find(self, keys: Tensor) -> Tensor:
        """(...) hashes of `path_keys` -> (...) numbers, -1 where the path is none of them."""
        known, numbers = self._keys.to(keys.device), self._numbers.to(keys.device)
        place = torch.searchsorted(known, keys.contiguous()).clamp_max(len(known) - 1)
        return torch.where(known[place] == keys, numbers[place], -1)
