"""Search with FAISS, where it is installed: flat, IVF or HNSW.

The index finds candidates; their scores are those of `mmembed.search.vectors`, so hits of an index and of exact search
compare, and equal scores are ordered by row. A flat index is exact up to the rounding of float32 at the k-th place; IVF
looks into `probes` of its `lists`, HNSW walks a graph, and both miss some. Costs: all keep the vectors in memory in
float32, HNSW 8 `links` bytes a row more; IVF reads a share of probes / lists of the corpus a query.

IVF and HNSW can be saved: a FAISS file as large as the index in memory, with a line of JSON behind it that says what it
was built of. A file that was cut off has no such line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from mmembed.errors import MmembedError, nearest
from mmembed.search.vectors import PAIRS, Hits, Rows, Similarity, Vectors, check_sizes, pair_scores
from mmembed.staging import staging

Kind = Literal["flat", "ivf", "hnsw"]
OPTIONS = {"flat": set(), "ivf": {"lists", "probes"}, "hnsw": {"links", "effort"}}
BLOCK = 65536  # rows that are added at a time
SAMPLE = 64  # rows a list that IVF's centres are trained on, of at most the corpus
COMPARED = 256  # rows that tell whether a saved index is of this corpus
SEARCH_OPTIONS = frozenset({"probes"})  # these may differ from those that an index was built with


class FaissIndex:
    """An index over a corpus.

    Args:
        corpus: (N, W) vectors, as `mmembed.search.top_k` takes them.
        kind: "flat" (exact), "ivf" (clusters) or "hnsw" (a graph; built on one thread, so that two are the same).
        similarity, dim: as `top_k` takes them.
        device: "cpu", or "cuda" or "cuda:1" for FAISS built for GPUs (flat and IVF).
        saved: a file of `save` to read, instead of building: of the same corpus and options (`probes` may differ).
        options: of IVF: `lists` (default 4 sqrt(N)), `probes` (default lists / 16). Of HNSW: `links` (default 32),
            `effort` of building and search (default 128).

    Raises:
        MmembedError: FAISS is not installed or not for GPUs, an unknown kind or option, no vectors, or one that is not
            finite; a saved index that is broken, or was built of something else.
    """

    def __init__(
        self,
        corpus: Vectors,
        kind: Kind = "flat",
        *,
        similarity: Similarity = "cosine",
        dim: int | None = None,
        device: str = "cpu",
        saved: str | Path | None = None,
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
        self.options, self.device = self._complete(options), device
        gpu = None if device == "cpu" else check_gpu(kind, device)
        self.index = self._build() if saved is None else self._read(Path(saved))
        if kind == "ivf":
            self.index.nprobe = self.options["probes"]
        if gpu is not None:
            self.index = self.faiss.index_cpu_to_gpu(self.faiss.StandardGpuResources(), gpu, self.index)

    def save(self, path: str | Path) -> None:
        """Writes the index, of a GPU too as one of a CPU: the whole file or none.

        Raises:
            MmembedError: a flat index, which is its vectors and nothing else: to build it again is to read them.
            OSError: the disk is full.
        """
        if self.kind == "flat":
            raise MmembedError("faiss: a flat index has nothing to save but its vectors; build it again from them")
        index = self.index if self.device == "cpu" else self.faiss.index_gpu_to_cpu(self.index)
        with staging(Path(path)) as staged:
            with staged.open("wb") as file:
                self.faiss.write_index(index, self.faiss.PyCallbackIOWriter(file.write))
                file.write(b"\n" + json.dumps(self._origin()).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)

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

    def _complete(self, options: Mapping[str, int]) -> dict[str, int]:
        """With the defaults of those that were not given."""
        count = len(self.rows)
        if self.kind == "hnsw":
            return {"links": 32, "effort": 128, **options}
        if self.kind == "ivf":
            lists = min(count, options.get("lists", max(1, int(4 * count**0.5))))
            return {"lists": lists, "probes": options.get("probes", max(1, lists // 16))}
        return {}

    def _build(self) -> Any:
        faiss, size, count, options = self.faiss, self.rows.size, len(self.rows), self.options
        if self.kind == "flat":
            return self._filled(faiss.IndexFlatIP(size))
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(size, options["links"], faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = index.hnsw.efSearch = options["effort"]
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)
            try:
                return self._filled(index)
            finally:
                faiss.omp_set_num_threads(threads)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, options["lists"], faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # no warning of a small corpus
        index.train(self.rows.take(np.linspace(0, count - 1, min(count, SAMPLE * options["lists"]), dtype=np.int64)))
        return self._filled(index)

    def _filled(self, index: Any) -> Any:
        for start in range(0, len(self.rows), BLOCK):
            index.add(self.rows.read(start, min(start + BLOCK, len(self.rows))))
        return index

    def _read(self, path: Path) -> Any:
        """The index of a file, if it was built of the same."""
        found = _origin_of(path)
        differs = [f"{key} {found.get(key)}, not {one}" for key, one in self._origin().items() if found.get(key) != one]
        if differs:
            raise MmembedError(
                f"faiss: {path} was built of something else ({'; '.join(differs)}); open it with the corpus and the "
                "options that it was built of, or build one"
            )
        try:
            return self.faiss.read_index(str(path))
        except RuntimeError as error:
            raise MmembedError(f"faiss: {path} is broken ({error}); build it again") from error

    def _origin(self) -> dict[str, Any]:
        """What the index depends on."""
        count = len(self.rows)
        rows = self.rows.stored[np.linspace(0, count - 1, min(count, COMPARED), dtype=np.int64)]
        options = {name: value for name, value in self.options.items() if name not in SEARCH_OPTIONS}
        origin = {"kind": self.kind, "similarity": self.similarity, "size": self.rows.size, "count": count, **options}
        return {**origin, "vectors": blake2b(rows.tobytes(), digest_size=8).hexdigest()}


def check_gpu(kind: Kind, device: str) -> int:
    """The number of the GPU that "cuda" or "cuda:1" names.

    Raises:
        MmembedError: another device, FAISS not for GPUs, an index that has none.
    """
    name, _, number = device.partition(":")
    if name != "cuda" or not (number or "0").isdecimal():
        raise MmembedError(f"faiss: there is no device '{device}'; give 'cpu' or 'cuda'")
    if "StandardGpuResources" not in vars(_faiss()):
        raise MmembedError("faiss: this build is for CPUs only; pip install faiss-gpu-cu12, or device 'cpu'")
    if kind == "hnsw":
        raise MmembedError("faiss: HNSW has no GPU index; take 'flat' or 'ivf', or device 'cpu'")
    return int(number or 0)


def _origin_of(path: Path) -> dict[str, Any]:
    """The last line of a saved index."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            found = json.loads(file.read().rpartition(b"\n")[2])
    except OSError as error:
        raise MmembedError(f"faiss: {path} cannot be read ({error.strerror}); build an index and save it") from error
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise MmembedError(f"faiss: {path} is no index that `save` wrote, or was cut off; build it again")
    return found


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MmembedError(
            f"faiss is not installed ({error}); pip install faiss-cpu, or search exactly with mmembed.top_k"
        ) from None
    return faiss
