"""Records that a guide agrees with: an embedder or a reranker that is not the one to be trained.

    negatives: out goes a negative n of a query q with  g(q, n) > g(q, p) - margin,  p the lowest positive that stays
    top_k:     out goes a positive above which more than top_k - 1 other documents stand in the guide's ranking

The first is after GISTEmbed's abstract (arXiv 2402.16829: a guide chooses the negatives of training), here once.
The second is a consistency filter in the manner of Promptagator (arXiv 2209.11755) and E5 (arXiv 2212.03533), of which
no number is taken; the pool is all documents of the items, and `corpus`. It needs a guide with vectors.

Cost: each distinct content (of a reranker: each pair) is computed once, in shards that a kill leaves there; then one
search. Memory: 170 bytes a distinct content, and 4,096 records with their scores; vectors stay on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.encoding import Rows, scores_of_pairs, vectors_of_files
from data_tools.synthesis.sides import Fault, is_positive, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from mmembed.errors import ConfigError, MmembedError
from mmembed.registry import Positive

if TYPE_CHECKING:  # they import torch, which a run without models does not need
    from data_tools.mining.retrievers import Encoder
    from data_tools.mining.teachers import PairTeacher
    from data_tools.mining.teachers.embedder import EmbedderTeacher

BLOCK = 4096  # records that are searched for together
Scored = Iterator[tuple[Item, NDArray[np.float32], NDArray[np.int64] | None]]  # scores (D,), rivals above each (D,)


class GuideModel(SetStage):
    """Keeps what a guide does not contradict.

    Args:
        guide: block of a teacher as in mining: embedder, cross_encoder, reranker.
        negatives: whether they are judged.
        margin: by which a positive must be rated above a negative.
        top_k: where among all documents a positive has to stand; None does not look.
        corpus: further documents of that ranking: files of lines of content, as a corpus.jsonl.
        write_scores: the guide's scores become the documents' `score`.
    """

    name: ClassVar[str] = "guide_model"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        guide: str | dict[str, Any],
        negatives: bool = True,
        margin: float = 0.0,
        top_k: Positive | None = None,
        corpus: Sequence[str] = (),
        write_scores: bool = False,
    ) -> None:
        from data_tools.mining.teachers import PairTeacher

        self.guide = _built(guide)
        if top_k is not None and isinstance(self.guide, PairTeacher):
            raise ConfigError(f"{self.name}.top_k: '{self.guide.name}' cannot rank all documents; name an embedder")
        if corpus and top_k is None:
            raise ConfigError(f"{self.name}.corpus: is of the ranking; set top_k")
        if not negatives and top_k is None and not write_scores:
            raise ConfigError(f"{self.name}: asks nothing of the guide; set negatives, top_k or write_scores")
        if margin and not negatives:
            raise ConfigError(f"{self.name}.margin: is of negatives, which are not judged; remove it")
        self.negatives, self.margin, self.top_k, self.write_scores = negatives, margin, top_k, write_scores
        self.corpus = [below_root(path) for path in corpus]
        for path in self.corpus:
            if not path.is_file():
                raise ConfigError(f"{self.name}.corpus: there is no {path}; check the path, or set root")

    def fingerprint(self) -> Any:
        stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.corpus]
        return [self.guide.fingerprint(), stamps]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        if not len(items):
            return
        for record, scores, rivals in self._scored(items, context):
            faults = self._faults(record, scores, rivals)
            yield from without(self._noted(record, scores), faults)

    def _scored(self, items: Items, context: Context) -> Scored:
        from data_tools.mining.teachers import PairTeacher

        reads = self.guide.reads
        queries = Rows(items, "query", context.media, reads)
        documents = Rows(items, "document", context.media, reads)
        if not isinstance(self.guide, PairTeacher):
            yield from self._by_vectors(items, queries, documents, self.guide.encoder, context)
            return
        scores = scores_of_pairs(self.guide, queries, documents, context)  # (P, 1)
        for place, record in enumerate(items):
            span = slice(documents.of_item[place], documents.of_item[place + 1])
            yield record, np.array(scores[span, 0]), None

    def _by_vectors(self, items: Items, queries: Rows, documents: Rows, encoder: Encoder, context: Context) -> Scored:
        from mmembed.search import pair_scores

        asked, pool = queries.vectors(encoder, context), documents.vectors(encoder, context)  # (Q, E), (N, E)
        further = vectors_of_files(self.corpus, documents, encoder, context) if self.corpus else None  # (M, E)
        stream = iter(items)
        for start in range(0, len(items), BLOCK):
            block = list(islice(stream, BLOCK))
            own = _padded([documents[start + at] for at in range(len(block))])  # (B, W)
            vectors = np.asarray(asked[queries.rows[start : start + len(block)]])  # (B, E)
            scores = pair_scores(vectors, pool, own)  # (B, W)
            rivals = None if self.top_k is None else self._rivals(block, vectors, own, scores, pool, further)
            for at, record in enumerate(block):
                count = len(record["documents"])
                yield record, scores[at, :count], None if rivals is None else rivals[at, :count]

    def _rivals(
        self,
        block: list[Item],
        vectors: NDArray[np.float32],
        own: NDArray[np.int64],
        scores: NDArray[np.float32],
        pool: NDArray[np.float32],
        further: NDArray[np.float32] | None,
    ) -> NDArray[np.int64]:
        """(B, W) how many documents are rated above each of a record's own, positives of the record apart; `top_k` and
        more are not told apart."""
        from mmembed.search import top_k

        assert self.top_k is not None, "it is asked for"
        positive = _padded([[is_positive(one) for one in record["documents"]] for record in block]) == 1  # (B, W)
        mine = np.where(positive, own, -1)
        found = top_k(vectors, pool, min(len(pool), self.top_k + own.shape[1]))  # (B, K)
        others = (found.indices[:, :, None] != mine[:, None, :]).all(axis=2)  # (B, K)
        above = found.scores[:, :, None] > scores[:, None, :]  # (B, K, W)
        rivals = (above & others[:, :, None]).sum(axis=1)
        if further is not None:
            hits = top_k(vectors, further, min(len(further), self.top_k)).scores  # (B, k)
            rivals += (hits[:, :, None] > scores[:, None, :]).sum(axis=1)
        return np.asarray(rivals, np.int64)

    def _faults(
        self, record: Item, scores: NDArray[np.float32], rivals: NDArray[np.int64] | None
    ) -> list[Fault | None]:
        faults: list[Fault | None] = [None] * len(scores)
        lowest = float("inf")
        for place, document in enumerate(record["documents"]):
            if not is_positive(document):
                continue
            if rivals is not None and self.top_k is not None and rivals[place] >= self.top_k:
                faults[place] = Fault("a positive not among the guide's nearest", f"{scores[place]:.4g}")
            else:
                lowest = min(lowest, float(scores[place]))
        for place, document in enumerate(record["documents"]):
            if self.negatives and not is_positive(document) and scores[place] > lowest - self.margin:
                faults[place] = Fault("a negative that the guide rates high", f"{scores[place]:.4g}, not {lowest:.4g}")
        return faults

    def _noted(self, record: Item, scores: NDArray[np.float32]) -> Item:
        if not self.write_scores:
            return record
        pairs = zip(record["documents"], scores.tolist(), strict=True)
        return {**record, "documents": [{**document, "score": round(score, 6)} for document, score in pairs]}


def _built(block: str | dict[str, Any]) -> EmbedderTeacher | PairTeacher:
    from data_tools.mining.teachers import TEACHERS, PairTeacher
    from data_tools.mining.teachers.embedder import EmbedderTeacher

    try:
        guide = TEACHERS.build(block)
        guide.fingerprint()  # the model is there
    except MmembedError as error:
        raise ConfigError(f"guide_model.guide: {error}") from None
    if not isinstance(guide, EmbedderTeacher | PairTeacher):
        raise ConfigError(f"guide_model.guide: '{guide.name}' compares by tokens; name an embedder or a reranker")
    return guide


def _padded(rows: list[Any]) -> NDArray[np.int64]:
    """(B, W), -1 behind the end of a row."""
    padded = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded
