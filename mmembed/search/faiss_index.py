"""Search with FAISS, where it is installed: flat, IVF or HNSW.

The index finds candidates; their scores are those of `mmembed.search.vectors`, so hits of an index and of exact search
compare, and equal scores are ordered by row. A flat index is exact up to the rounding of float32 at the k-th place; IVF
looks into `probes` of its `lists`, HNSW walks a graph, and both miss some. Costs: all keep the vectors in memory in
float32, HNSW 8 `links` bytes a row more; IVF reads a share of probes / lists of the corpus a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np

from mmembed.errors import MmembedError, nearest
from mmembed.search.vectors import PAIRS, Hits, Rows, Similarity, Vectors, check_sizes, pair_scores

Kind = Literal["flat", "ivf", "hnsw"]
OPTIONS = {"flat": set(), "ivf": {"lists", "probes"}, "hnsw": {"links", "effort"}}
BLOCK = 65536  # rows that are added at a time
SAMPLE = 64  # rows a list that IVF's centres are trained on, of at most the corpus


class FaissIndex:
    """An index over a corpus.

    Args:
        corpus: (N, W) vectors, as `mmembed.search.top_k` takes them.
        kind: "flat" (exact), "ivf" (clusters) or "hnsw" (a graph; built on one thread, so that two are the same).
        similarity, dim: as `top_k` takes them.
        device: "cpu", or "cuda" for FAISS built for GPUs (flat and IVF).
        options: of IVF: `lists` (default 4 sqrt(N)), `probes` (default lists / 16). Of HNSW: `links` (default 32),
            `effort` of building and search (default 128).

    Raises:
        MmembedError: FAISS is not installed or not for GPUs, an unknown kind or option, no vectors, or one that is not
            finite.
    """

    def __init__(
        self,
        corpus: Vectors,
        kind: Kind = "flat",
        *,
        similarity: Similarity = "cosine",
        dim: int | None = None,
        device: str = "cpu",
        **options: int,
    ) -> None:
        if kind not in OPTIONS:
            raise MmembedError(f"faiss: there is no index '{kind}'; {nearest(kind, OPTIONS)}")
        for name in options:
            if name not in OPTIONS[kind]:
                hint = nearest(name, OPTIONS[kind]) if OPTIONS[kind] else "it takes none"
                raise MmembedError(f"faiss: {kind} has no option '{name}'; {hint}")
        self.faiss = _faiss()
        self.kind, self.similarity, self.dim = kind, similarity, dim
        self.rows = Rows(corpus, similarity, "corpus", dim)
        if not len(self.rows):
            raise MmembedError("faiss: a corpus without vectors")
        self.index = self._build(options)
        if device != "cpu":
            self.index = self._on_gpu()

    def top_k(self, queries: Vectors, k: int) -> Hits:
        """Of each query k rows, best first; -1 and -inf where an index found fewer. As `mmembed.search.top_k`."""
        if k < 1:
            raise MmembedError(f"top_k: k is {k}; give at least 1")
        left = Rows(queries, self.similarity, "queries", self.dim)
        k = min(k, len(self.rows))
        check_sizes(left.size, self.rows.size)
        hits = Hits(np.full((len(left), k), -np.inf, np.float32), np.full((len(left), k), -1, np.int64))
        for start in range(0, len(left), PAIRS):
            part = left.read(start, min(start + PAIRS, len(left)))
            _, found = self.index.search(part, k)  # (q, k)
            scores = pair_scores(left.stored[start : start + PAIRS], self.rows.stored, found, **self._settings)
            scores = np.where(np.isnan(scores), -np.inf, scores)
            order = np.lexsort((found, -scores), axis=1)
            at = slice(start, start + len(part))
            hits.scores[at] = np.take_along_axis(scores, order, axis=1)
            hits.indices[at] = np.take_along_axis(found, order, axis=1)
        return hits

    @property
    def _settings(self) -> Mapping[str, Any]:
        return {"similarity": self.similarity, "dim": self.dim}

    def _build(self, options: Mapping[str, int]) -> Any:
        faiss, size, count = self.faiss, self.rows.size, len(self.rows)
        if self.kind == "flat":
            return self._filled(faiss.IndexFlatIP(size))
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(size, options.get("links", 32), faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = index.hnsw.efSearch = options.get("effort", 128)
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)
            try:
                return self._filled(index)
            finally:
                faiss.omp_set_num_threads(threads)
        lists = min(count, options.get("lists", max(1, int(4 * count**0.5))))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # no warning of a small corpus
        index.nprobe = options.get("probes", max(1, lists // 16))
        index.train(self.rows.take(np.linspace(0, count - 1, min(count, SAMPLE * lists), dtype=np.int64)))
        return self._filled(index)

    def _filled(self, index: Any) -> Any:
        for start in range(0, len(self.rows), BLOCK):
            index.add(self.rows.read(start, min(start + BLOCK, len(self.rows))))
        return index

    def _on_gpu(self) -> Any:
        if "StandardGpuResources" not in vars(self.faiss):
            raise MmembedError("faiss: this build is for CPUs only; pip install faiss-gpu-cu12, or device 'cpu'")
        if self.kind == "hnsw":
            raise MmembedError("faiss: HNSW has no GPU index; take 'flat' or 'ivf', or device 'cpu'")
        return self.faiss.index_cpu_to_gpu(self.faiss.StandardGpuResources(), 0, self.index)


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MmembedError(
            f"faiss is not installed ({error}); pip install faiss-cpu, or search exactly with mmembed.top_k"
        ) from None
    return faiss
