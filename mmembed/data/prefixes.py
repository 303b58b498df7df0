"""Which rows of a batch begin with the same tokens, and where sharing that beginning pays.

Only whole equal token ids count, so a tokenizer that merges the last letters of an instruction with the first of a
content costs a token of the prefix and no exactness. Rows are sorted by their ids; the common beginnings of neighbours
form a tree, and a group is cut into smaller ones with longer beginnings where that saves more tokens. Cost: 5 ms for
2,048 rows with beginnings of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Below these the longer way through attention costs more than the tokens saved (docs/log.md, shared prefixes).
SHORTEST = 4  # tokens of a prefix
LEAST_SAVED = 0.1  # of the tokens of a group
# A group is a chunk more: it has to save a part of a chunk, or of all tokens where these are few.
LEAST_OF_CHUNK, LEAST_OF_ALL = 0.125, 0.1


@dataclass(frozen=True)
class Group:
    """Rows that share their first `prefix` tokens; 0 where they share nothing worth it."""

    prefix: int
    rows: tuple[int, ...]


def group_by_prefix(ids: Sequence[Sequence[int]], limits: Sequence[int], chunk_tokens: int) -> list[Group]:
    """Each row in one group; those that share nothing in the last one, of prefix 0.

    Args:
        limits: of each row, how many of its first tokens may be shared.
        chunk_tokens: what a chunk holds.
    """
    order = sorted(range(len(ids)), key=lambda row: list(ids[row][: limits[row]]))
    common = _common([ids[row] for row in order], [limits[row] for row in order])
    tokens = np.cumsum([0, *(len(ids[row]) for row in order)])
    least = min(LEAST_OF_CHUNK * chunk_tokens, LEAST_OF_ALL * tokens[-1])
    groups = [Group(prefix, tuple(order[start:stop])) for start, stop, prefix in _best(common, tokens, least)]
    grouped = {row for group in groups for row in group.rows}
    return [*groups, Group(0, tuple(row for row in range(len(ids)) if row not in grouped))]


def _common(ids: Sequence[Sequence[int]], limits: Sequence[int]) -> np.ndarray:
    """(n - 1,) tokens that each row and the next have in common, within their limits."""
    width = max(limits, default=0)
    table = np.full((len(ids), width), -1, dtype=np.int64)  # (n, W); -1 is no token, and equal to none below
    for row, (tokens, limit) in enumerate(zip(ids, limits, strict=True)):
        table[row, :limit] = tokens[:limit]
    alike = (table[1:] == table[:-1]) & (table[1:] >= 0)
    return np.logical_and.accumulate(alike, axis=1).sum(axis=1) if width else np.zeros(max(0, len(ids) - 1), int)


def _best(common: np.ndarray, tokens: np.ndarray, least: float) -> list[tuple[int, int, int]]:
    """(start, stop, prefix) of the groups of neighbours that save the most tokens, where that is enough.

    The tree has a node for each run of neighbours with a common beginning; a node's children are the runs between its
    shallowest neighbours. `saved` of a node is the better of sharing its beginning and what its children save.

    Args:
        common: (n - 1,) tokens that neighbours have in common.
        tokens: (n + 1,) tokens of all rows before each.
        least: tokens that a group has to save.
    """
    nodes: list[tuple[int, int, int, list[int]]] = []  # start, stop, prefix, children
    stack = [(0, len(tokens) - 1, -1)]
    while stack:
        first, last, parent = stack.pop()
        if last - first < 2:
            continue
        inside = common[first : last - 1]
        prefix = int(inside.min())
        nodes.append((first, last, prefix, []))
        if parent >= 0:
            nodes[parent][3].append(len(nodes) - 1)
        cuts = [first, *(first + 1 + np.flatnonzero(inside == prefix)).tolist(), last]
        stack += [(a, b, len(nodes) - 1) for a, b in pairwise(cuts) if b - a >= 2]
    saved = [0] * len(nodes)
    chosen: list[list[tuple[int, int, int]]] = [[] for _ in nodes]
    for number in range(len(nodes) - 1, -1, -1):  # children come after their parents
        first, last, prefix, children = nodes[number]
        own, theirs = prefix * (last - first - 1), sum(saved[child] for child in children)
        pays = prefix >= SHORTEST and own >= max(least, LEAST_SAVED * (tokens[last] - tokens[first]))
        if pays and own >= theirs:
            saved[number], chosen[number] = own, [(first, last, prefix)]
        else:
            saved[number], chosen[number] = theirs, [group for child in children for group in chosen[child]]
    return chosen[0] if chosen else []
