"""What is served: an embedder or a reranker, as rows in, numbers out.

`prepare` is called by one thread and `run` by another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import CheckpointError, ConfigError
from mmembed.inference.embedder import CPU_TOKENS, TOKEN_BUDGET, Embedder
from mmembed.inference.reranker import Reranker
from mmembed.media import MediaStore
from mmembed.models.folder import SETTINGS, read_settings, settle
from mmembed.packaged import resolve
from mmembed.quantize import truncate
from mmembed.serving.vllm import read_manifest

if TYPE_CHECKING:
    from mmembed.content import ContentLike, Role
    from mmembed.media_limits import MediaLimits
    from mmembed.models.embedding_model import EmbeddingModel
    from mmembed.preprocess import Row

BATCHES = 4  # of the embedder's, in one of ours: enough to sort by length, and to give each thread some


class Served(Protocol):
    """What the batcher runs."""

    name: str
    together: bool  # whether the rows of a request go through the model together, and with no others
    batch_tokens: int  # of a batch

    def run(self, rows: list[Row]) -> NDArray[np.float32]:
        """A result a row (N, ...)."""


class ServedEmbedder:
    """An embedder under the name that requests give."""

    together = False

    def __init__(self, name: str, embedder: Embedder) -> None:
        self.name, self.embedder, self.size = name, embedder, embedder.embedding_size
        self.batch_tokens = _batch_tokens(embedder.model)

    def limit(self, media: MediaLimits) -> None:
        """What may be opened of pictures from now on."""
        self.embedder.preprocessor.media = MediaStore(None, media)

    def prepare(
        self, contents: Sequence[ContentLike], role: Role = "document", instructions: Sequence[str | None] | None = None
    ) -> list[Row]:
        return self.embedder.prepare(contents, role=role, instruction=instructions)

    def run(self, rows: list[Row]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.embedder.encode(rows, show_progress=False)
        return vectors  # (N, E)

    def shorten(self, vectors: NDArray[np.float32], dim: int | None) -> NDArray[np.float32]:
        """(N, E) -> (N, dim), as `Embedder.encode` with `truncate_dim`."""
        return vectors if dim is None else truncate(vectors, dim, self.embedder.model.normalize)


class ServedReranker:
    """A reranker under the name that requests give."""

    def __init__(self, name: str, reranker: Reranker) -> None:
        self.name, self.reranker, self.together = name, reranker, reranker.reads_lists
        self.batch_tokens = _batch_tokens(reranker.model)

    def limit(self, media: MediaLimits) -> None:
        self.reranker.preprocessor.media = MediaStore(None, media)

    def prepare(
        self, query: ContentLike, documents: Sequence[ContentLike], instruction: str | None = None
    ) -> list[Row]:
        return self.reranker.prepare(query, documents, instruction=instruction)

    def run(self, rows: list[Row]) -> NDArray[np.float32]:
        return self.reranker.score_prepared(rows)  # (N,)


def load(
    path: str, name: str, *, device: str | None, dtype: str, trust_remote_code: bool
) -> ServedEmbedder | ServedReranker:
    """Loads a checkpoint folder or a backbone, and computes once with it, so that the first request is no slower.

    Raises:
        ConfigError: it gives many vectors a content, answers in words, or was exported for another runtime.
        MmembedError: it cannot be loaded.
    """
    manifest = read_manifest(path)
    if manifest is not None and manifest.get("target") not in ("merged", "adapter"):
        raise ConfigError(
            f"{path}: is an export for {manifest.get('target')}, which mmembed would read as a bare backbone; serve "
            "the checkpoint that it was made of, or use that runtime"
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if _is_reranker(path):
        reranker = ServedReranker(name, Reranker.from_pretrained(path, **options))
        reranker.run(reranker.prepare("a", ["b", "c"]))
        return reranker
    embedder = ServedEmbedder(name, Embedder.from_pretrained(path, **options))
    if embedder.embedder.model.pooling.multi_vector:
        raise ConfigError(
            f"{path}: gives many vectors a content, and an embedding of OpenAI's schema is one; use Embedder.encode in "
            "Python, or train with another pooling"
        )
    embedder.run(embedder.prepare(["a", "b"]))
    return embedder


def describe(model: ServedEmbedder | ServedReranker) -> str:
    """For whoever started the server."""
    kind = f"{model.size} dimensions" if isinstance(model, ServedEmbedder) else "a reranker"
    return f"{model.name} ({kind})"


def _is_reranker(path: str) -> bool:
    folder = Path(resolve(path))
    if folder.is_dir():
        settle(folder)
    if not (folder / SETTINGS).is_file():
        return False
    try:
        settings, _ = read_settings(folder)
    except CheckpointError as error:
        raise ConfigError(f"{path}: cannot be served ({error})") from error
    return settings.head is not None


def _batch_tokens(model: EmbeddingModel) -> int:
    return BATCHES * (CPU_TOKENS if model.device.type == "cpu" else TOKEN_BUDGET)
