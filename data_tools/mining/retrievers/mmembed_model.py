"""An mmembed checkpoint, a bare backbone, or the packaged nano. Texts, pictures, videos, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.model_files import model_digest
from data_tools.mining.retrievers import Encoder, Item
from mmembed.content import Role
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.registry import Positive

if TYPE_CHECKING:
    from mmembed.inference.embedder import Embedder


class MmembedModel(Encoder):
    """An mmembed model.

    Args:
        model: checkpoint folder, backbone folder or name, or mmembed-nano.
        device, dtype, token_budget, truncate_dim, layers: as `Embedder` takes them.
        vision_cache: keep features of pictures on disk: a folder, auto or off.
    """

    name: ClassVar[str] = "mmembed"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image", "video"})

    def __init__(
        self,
        model: str = "mmembed-nano",
        device: str | None = None,
        dtype: str = "auto",
        token_budget: Positive | None = None,
        truncate_dim: Positive | None = None,
        layers: Positive | None = None,
        vision_cache: str = "off",
    ) -> None:
        self.model, self.device, self.dtype, self.token_budget = model, device, dtype, token_budget
        self.truncate_dim, self.layers, self.vision_cache = truncate_dim, layers, vision_cache
        self._embedder: Embedder | None = None

    def fingerprint(self) -> Any:
        return [self.name, model_digest(self.model), self.dtype, self.truncate_dim, self.layers]

    def load(self, media: MediaStore) -> None:
        from transformers.utils.logging import disable_progress_bar

        from mmembed.inference.embedder import Embedder

        disable_progress_bar()  # a bar a file of weights says nothing
        if self._embedder is None:
            self._embedder = Embedder.from_pretrained(
                self.model, device=self.device, dtype=self.dtype, layers=self.layers, vision_cache=self.vision_cache
            )
            if self._embedder.model.pooling.multi_vector:
                raise ConfigError(
                    f"retriever: {self.model} gives many vectors a content; search with a model of one vector"
                )
        self._embedder.preprocessor.media = media

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        assert self._embedder is not None, "load it first"
        contents, instructions = [item.content for item in items], [item.instruction for item in items]
        options: dict[str, Any] = {"token_budget": self.token_budget, "truncate_dim": self.truncate_dim}
        try:
            vectors: NDArray[np.float32] = self._embedder.encode(
                contents, role=role, instruction=instructions, show_progress=False, **options
            )
        except MmembedError:
            for item in items:  # find out which, and name it by its place in the data
                try:
                    self._embedder.check(item.content, role=role)
                except MmembedError as error:
                    raise MmembedError(f"{item}: {error}; or set on_bad_record: skip") from error
            raise
        return vectors
