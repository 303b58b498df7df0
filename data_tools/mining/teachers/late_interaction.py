"""An mmembed model of many vectors a content (pooling `multi_vector`): MaxSim over what the retriever found.

    s(q, d) = sum over the vectors i of q of max over the vectors j of d of cos(q_i, d_j)

ColBERT (arXiv 2004.12832). Each query and document is encoded once (`data_tools.mining.tokens`), whatever the number of
its pairs, and scored by `mmembed.search.rescore_maxsim`: 0.25 ms of a core for 20 and 200 tokens of 128 dimensions.
Texts, pictures, videos, mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import PROBE, Item
from data_tools.mining.retrievers.mmembed_model import MmembedModel
from data_tools.mining.teachers import Teacher
from mmembed.content import Role
from mmembed.errors import MmembedError
from mmembed.media import MediaStore
from mmembed.quantize import decode, quantize
from mmembed.registry import Positive

_LARGEST = {"float16": float(np.finfo(np.float16).max)}


class LateInteraction(Teacher):
    """An mmembed checkpoint with a pooling of many vectors.

    Args:
        model: its folder.
        precision: of the stored vectors; ColBERT stores 2 bytes a dimension, too.
        device, dtype, token_budget, truncate_dim, layers, vision_cache: as of retriever `mmembed`.
    """

    name: ClassVar[str] = "late_interaction"
    reads = MmembedModel.reads

    def __init__(
        self,
        model: str,
        precision: Literal["float32", "float16", "bfloat16", "int8"] = "float16",
        device: str | None = None,
        dtype: str = "auto",
        token_budget: Positive | None = None,
        truncate_dim: Positive | None = None,
        layers: Positive | None = None,
        vision_cache: str = "off",
    ) -> None:
        self.precision = precision
        self._model = MmembedModel(model, device, dtype, token_budget, truncate_dim, layers, vision_cache)

    def fingerprint(self) -> Any:
        return [self.name, self.precision, self._model.settings(many=True)]

    def load(self, media: MediaStore) -> None:
        self._model.open(media, many=True)

    def probe(self) -> NDArray[np.float32]:
        """(E,) the mean of those of a fixed text; see `Encoder`."""
        (vectors,) = self.encode([Item(PROBE, None, None, "the probe")], "document")
        mean: NDArray[np.float32] = decode(vectors).mean(axis=0)
        return mean

    def encode(self, items: Sequence[Item], role: Role) -> list[NDArray[Any]]:
        """(T, W) of each, in the precision. Raises MmembedError naming an item."""
        return [self._stored(one, item) for one, item in zip(self._model.vectors(items, role), items, strict=True)]

    def _stored(self, vectors: NDArray[np.float32], item: Item) -> NDArray[Any]:
        if not len(vectors):
            raise MmembedError(f"{item}: the teacher has no vector for it; leave it out")
        if not np.abs(vectors).max() <= _LARGEST.get(self.precision, np.finfo(np.float32).max):
            raise MmembedError(
                f"{item}: the teacher gives NaN or infinity for it in {self.precision}; load the model in float32 "
                "(dtype: float32, precision: float32), or leave it out"
            )
        return quantize(vectors, self.precision)
