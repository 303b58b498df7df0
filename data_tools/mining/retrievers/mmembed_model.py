"""An mmembed checkpoint, a bare backbone, or the packaged nano. Texts, pictures, videos, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Encoder, Item
from mmembed.content import Role
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.files import gives_many, model_digest, model_folder
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
        return [self.name, *self.settings(many=False)]

    def load(self, media: MediaStore) -> None:
        self.open(media, many=False)

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.vectors(items, role)
        return vectors

    def settings(self, many: bool) -> list[Any]:
        """What its vectors depend on. Raises ConfigError where a folder says that they are not `many` a content."""
        if model_folder(self.model).is_dir():
            self._check(gives_many(self.model), many)
        return [model_digest(self.model), self.dtype, self.truncate_dim, self.layers]

    def open(self, media: MediaStore, many: bool) -> None:
        """See `load`. Raises ConfigError where it does not give `many` vectors a content."""
        from transformers.utils.logging import disable_progress_bar

        from mmembed.inference.embedder import Embedder

        disable_progress_bar()  # a bar a file of weights says nothing
        if self._embedder is None:
            self._embedder = Embedder.from_pretrained(
                self.model, device=self.device, dtype=self.dtype, layers=self.layers, vision_cache=self.vision_cache
            )
            self._check(self._embedder.model.pooling.multi_vector, many)
        self._embedder.preprocessor.media = media

    def vectors(self, items: Sequence[Item], role: Role) -> Any:
        """(n, E), or a list of (T, E) where it gives many."""
        assert self._embedder is not None, "load it first"
        contents, instructions = [item.content for item in items], [item.instruction for item in items]
        options: dict[str, Any] = {"token_budget": self.token_budget, "truncate_dim": self.truncate_dim}
        try:
            return self._embedder.encode(contents, role=role, instruction=instructions, show_progress=False, **options)
        except MmembedError:
            for item in items:  # find out which, and name it by its place in the data
                try:
                    self._embedder.check(item.content, role=role)
                except MmembedError as error:
                    raise MmembedError(f"{item}: {error}; or set on_bad_record: skip") from error
            raise

    def _check(self, many: bool, wanted: bool) -> None:
        if many and not wanted:
            raise ConfigError(
                f"retriever: {self.model} gives many vectors a content; search with a model of one vector, and let "
                f"this one judge what is found: teacher={{type: late_interaction, model: {self.model}}}"
            )
        if wanted and not many:
            raise ConfigError(
                f"teacher 'late_interaction': {self.model} gives one vector a content; write "
                f"teacher={{type: embedder, retriever: {{type: mmembed, model: {self.model}}}}}, or name a model with "
                "pooling 'multi_vector'"
            )
