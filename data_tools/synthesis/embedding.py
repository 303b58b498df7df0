"""Vectors for stages that compare contents with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmembed.config.blocks import TypedBlock
from mmembed.content import Role
from mmembed.errors import ConfigError

if TYPE_CHECKING:
    from data_tools.mining.retrievers import Encoder


def encoder_of(block: TypedBlock | None, stage: str) -> Encoder:
    """What gives vectors, as a block of mining's `retriever` names it; loads nothing.

    Raises:
        ConfigError: none is named, there is no such one, or it gives no vectors.
    """
    from data_tools.mining.retrievers import RETRIEVERS, Encoder  # imports torch

    if block is None:
        raise ConfigError(f"{stage}.embedder: is missing; name one: {{type: mmembed, model: runs/embedder}}")
    found = RETRIEVERS.build(block)
    if not isinstance(found, Encoder):
        raise ConfigError(
            f"{stage}.embedder: '{found.name}' gives no vectors; name an embedder, {{type: mmembed, ...}}"
        )
    return found


def unit_vectors(encoder: Encoder, contents: Sequence[Any], where: Sequence[str], role: Role) -> NDArray[np.float32]:
    """(n, E), of length 1. Raises MmembedError naming the item whose content cannot be embedded."""
    from data_tools.mining.retrievers import Item

    items = [Item(content, None, None, place) for content, place in zip(contents, where, strict=True)]
    vectors = encoder.encode(items, role)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
