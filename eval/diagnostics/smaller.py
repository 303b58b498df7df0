"""What smaller vectors lose: prefixes (Matryoshka), eight bits or one bit a dimension, with and without rescoring."""

from __future__ import annotations

import numpy as np

from eval.vectors import ndcg_by_query
from mmembed.quantize import Precision, decode, quantize, truncate, unit_rows

RESCORED = 40  # documents a query: four times the ten that count, as sentence-transformers rescores
LEAST = 8


def prefixes(size: int) -> list[int]:
    """Powers of two from 8 below the whole size, and the whole.

    >>> prefixes(96)
    [8, 16, 32, 64, 96]
    """
    return [LEAST << step for step in range(size.bit_length()) if LEAST << step < size] + [size]


def cut(queries: np.ndarray, documents: np.ndarray, relevance: np.ndarray, dim: int) -> np.ndarray:
    """(Q,) nDCG@10 with the first `dim` dimensions, of unit length again (Matryoshka, arXiv 2205.13147).

    Args:
        queries: (Q, E). documents: (D, E). relevance: (Q, D).
    """
    return ndcg_by_query(unit_rows(truncate(queries, dim)) @ unit_rows(truncate(documents, dim)).T, relevance)


def coded(
    queries: np.ndarray, documents: np.ndarray, relevance: np.ndarray, precision: Precision, rescored: bool
) -> np.ndarray:
    """(Q,) nDCG@10 where both sides are stored in a precision (`mmembed.quantize`).

    Args:
        queries: (Q, E). documents: (D, E). relevance: (Q, D).
        rescored: the best `RESCORED` of each query are ordered again by the float32 vectors; what was not among them
            stays below.
    """
    dim = queries.shape[1]
    left, right = (unit_rows(decode(quantize(side, precision), dim)) for side in (queries, documents))
    similarity = np.round(left @ right.T, 6)  # (Q, D); equal codes tie, whatever the sum was rounded to
    if not rescored:
        return ndcg_by_query(similarity, relevance)
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :RESCORED]  # (Q, R)
    exact = unit_rows(queries) @ unit_rows(documents).T
    again = np.full_like(similarity, -np.inf)
    np.put_along_axis(again, best, np.take_along_axis(exact, best, axis=1), axis=1)
    return ndcg_by_query(np.where(np.isfinite(again), again, similarity - 4), relevance)  # cosines differ by 2 at most
