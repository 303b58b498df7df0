"""A reranker of `recipes/train_reranker.py`: texts, pictures, videos, mixed, on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Item
from data_tools.mining.teachers import PairTeacher
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.files import model_digest, model_folder
from mmembed.registry import Positive

if TYPE_CHECKING:
    from mmembed.inference.reranker import Reranker


class RerankerTeacher(PairTeacher):
    """An mmembed reranker.

    Args:
        model: its folder.
        scale: `logit`, or `probability` of being relevant.
        device, dtype, token_budget: as `Reranker` takes them.
    """

    name: ClassVar[str] = "reranker"
    reads = frozenset({"text", "image", "video"})

    def __init__(
        self,
        model: str,
        scale: Literal["logit", "probability"] = "logit",
        device: str | None = None,
        dtype: str = "auto",
        token_budget: Positive | None = None,
    ) -> None:
        self.model, self.scale, self.device, self.dtype, self.token_budget = model, scale, device, dtype, token_budget
        self._reranker: Reranker | None = None

    def fingerprint(self) -> Any:
        from mmembed.models.folder import SETTINGS, read_settings

        folder = model_folder(self.model)
        if not (folder / SETTINGS).is_file() or read_settings(folder)[0].head is None:
            raise ConfigError(
                f"teacher.model: {self.model} is no folder of a reranker; train one with recipes/train_reranker.py"
            )
        return [self.name, model_digest(self.model), self.scale, self.dtype]

    def load(self, media: MediaStore) -> None:
        from mmembed.inference.reranker import Reranker

        if self._reranker is None:
            self._reranker = Reranker.from_pretrained(self.model, device=self.device, dtype=self.dtype)
        self._reranker.preprocessor.media = media

    def score(self, queries: Sequence[Item], documents: Sequence[Item]) -> NDArray[np.float32]:
        assert self._reranker is not None, "it is loaded first"
        pairs = [(query.content, document.content) for query, document in zip(queries, documents, strict=True)]
        told = [query.instruction for query in queries]
        options: dict[str, Any] = {"scale": self.scale, "token_budget": self.token_budget}
        try:
            return self._reranker.score(pairs, instruction=told, show_progress=False, **options)
        except MmembedError as error:
            raise MmembedError(f"teacher: {self.model}: pairs of {queries[0]} and on: {error}") from error
