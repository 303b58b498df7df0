"""Similarities of A and B embeddings -> (A, B).

cosine, dot: one vector an input. maxsim (ColBERT, arXiv 2004.12832): sum over the left side's vectors of the largest
dot product with the right side's. maxsim_mean (FILIP, arXiv 2111.07783): the mean, so that a temperature means the same
for short and long inputs. The last two are not symmetric: similarity(a, b) is not similarity(b, a).T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError, nearest

Similarity = Callable[[Embeddings, Embeddings], Tensor]
PRODUCTS = 2**24  # dot products of late interaction alive at once: 64 MB in float32


def unit(embeddings: Embeddings) -> Tensor:
    return functional.normalize(embeddings.vectors, dim=-1)


def raw(embeddings: Embeddings) -> Tensor:
    return embeddings.vectors


def cosine(a: Embeddings, b: Embeddings) -> Tensor:
    return unit(a) @ unit(b).T


def dot(a: Embeddings, b: Embeddings) -> Tensor:
    return raw(a) @ raw(b).T


def maxsim(a: Embeddings, b: Embeddings) -> Tensor:
    """The A*B*T*S products are made in blocks of both sides, and again in the backward instead of being kept."""
    mask_a, mask_b = _mask(a), _mask(b)  # (A, T), (B, S)
    rows_a, rows_b = _block_rows(len(mask_a), mask_a.shape[1] * mask_b.shape[1])
    right = list(zip(b.vectors.split(rows_b), mask_b.split(rows_b), strict=True))
    return torch.cat(
        [
            torch.cat(
                [
                    checkpoint(_maxsim_block, x, y, keep_x, keep_y, use_reentrant=False, preserve_rng_state=False)
                    for y, keep_y in right
                ],
                dim=1,
            )
            for x, keep_x in zip(a.vectors.split(rows_a), mask_a.split(rows_a), strict=True)
        ]
    )


def maxsim_mean(a: Embeddings, b: Embeddings) -> Tensor:
    return maxsim(a, b) / _mask(a).sum(1, keepdim=True)


SIMILARITIES: dict[str, Similarity] = {"cosine": cosine, "dot": dot, "maxsim": maxsim, "maxsim_mean": maxsim_mean}
# those that are a product of (A, E) and (B, E), and what makes a side of it
PRODUCTS_OF: dict[Similarity, Callable[[Embeddings], Tensor]] = {cosine: unit, dot: raw}


def get_similarity(name: str) -> Similarity:
    """By name. Raises ConfigError naming the nearest."""
    if name not in SIMILARITIES:
        raise ConfigError(f"objective.similarity: there is no '{name}'; {nearest(name, SIMILARITIES)}")
    return SIMILARITIES[name]


def _block_rows(count: int, products_a_pair: int) -> tuple[int, int]:
    """Rows of each side of a block: at most 16 of the left, and as many of the right as PRODUCTS allow."""
    rows = max(1, min(count, 16, PRODUCTS // products_a_pair))
    return rows, max(1, PRODUCTS // (rows * products_a_pair))


def _maxsim_block(a: Tensor, b: Tensor, mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """(A, T, E), (B, S, E), (A, T), (B, S) -> (A, B)."""
    products = torch.einsum("ate,bse->abts", a, b)  # (A, B, T, S)
    best = products.masked_fill(~mask_b[None, :, None, :], float("-inf")).amax(-1)  # (A, B, T)
    return (best * mask_a[:, None, :]).sum(-1)


def _mask(embeddings: Embeddings) -> Tensor:
    if embeddings.mask is None:
        raise ConfigError(
            "maxsim compares several vectors an input; use pooling 'multi_vector', or similarity 'cosine'"
        )
    return embeddings.mask
