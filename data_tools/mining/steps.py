"""The steps of mining one source: vectors, candidates, a teacher's scores, the choice.

What is expensive is kept in shards (`mmembed.shards`), each under a digest of what it depends on, so a step is done
once for the same contents, model and settings: other rules choose anew among the same candidates without encoding
anything. The choice itself is a function of candidates, rules and seed, and is made again each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.files import digest
from data_tools.mining.collection import Collection
from data_tools.mining.judging import Floats, Judge, Place, Rows, encoded
from data_tools.mining.models import Models
from data_tools.mining.retrievers import Lexical, Retriever
from data_tools.mining.settings import MiningConfig
from data_tools.mining.stages import joined, read_stage, remove_stage, write_stage
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.mining import MINERS, Candidates, mine
from mmembed.mining.debcse import shared_words
from mmembed.mining.mcl import next_stage
from mmembed.mining.owner_similarity import with_owners
from mmembed.search import FaissIndex, Hits, pair_scores, top_k
from mmembed.search.faiss_index import SEARCH_OPTIONS
from mmembed.shards import Shards

logger = logging.getLogger(__name__)
FOUND = np.dtype([("row", "<i8"), ("score", "<f4")])


@dataclass
class Mined:
    """What was chosen for the Q queries of a source.

    negatives: (Q, K) rows of the corpus, -1 where there were too few.
    scores, judged: (Q, K) the retriever's and the teacher's scores of them, NaN where there is none.
    known: (Q, P + B) the positives, then the barred rows; known_scores, known_judged: theirs.
    filled: (Q, K) which came from a fill, beyond what was found.
    ranks: (Q, K) places among the candidates, from 0; -1 of what was filled.
    first: (Q,) the retriever's score of the best candidate.
    removed: by what how many candidates were no longer there to choose.
    clusters: how many the rules saw, of how many stages, and how many documents each earlier one did not have.
    """

    negatives: Rows
    scores: Floats
    judged: Floats | None
    known: Rows
    known_scores: Floats
    known_judged: Floats | None
    filled: NDArray[np.bool_]
    ranks: Rows
    first: Floats
    positives: int
    removed: dict[str, int]
    clusters: dict[str, Any] | None = None

    def least(self, scores: Floats) -> Floats:
        """(Q,) the lowest of the positives' scores, of `known_scores` or `known_judged`; NaN where there are none."""
        own = np.where(self.known[:, : self.positives] >= 0, scores[:, : self.positives], np.inf)
        least = own.min(axis=1, initial=np.inf)
        return np.where(np.isfinite(least), least, np.nan).astype(np.float32)


class SourceMiner:
    """Mines one source.

    Args:
        work: the folder of its shards.
    """

    def __init__(
        self, config: MiningConfig, title: str, found: Collection, media: MediaStore, models: Models, work: Path
    ):
        self.config, self.title, self.found, self.media, self.models, self.work = (
            config,
            title,
            found,
            media,
            models,
            work,
        )
        self.known = np.concatenate([found.positives, found.barred], axis=1)  # (Q, P + B)
        self._indexed = False  # by a lexical retriever
        assert models.retriever is not None, "mining has one"
        self.retriever: Retriever = models.retriever
        workers = None if config.ray is None else config.ray.used
        self.place = Place(title, found, media, models, work, config.shard, workers)
        self.judge = Judge(self.place, config.search.precision)
        self.rules = [MINERS.build(block) for block in config.rules]
        self._check()
        self.earlier = [read_stage(output, work.name, found.corpus_keys) for output in config.earlier]

    def _check(self) -> None:
        """Raises ConfigError: kinds of media that a model does not read, too small a corpus."""
        self.place.check_kinds()
        if self.config.clusters is not None and len(self.found) < self.config.clusters:
            raise ConfigError(
                f"'{self.title}': clusters {self.config.clusters} of {len(self.found)} documents; give fewer"
            )
        left = len(self.found) - (self.known >= 0).sum(axis=1)
        least, depth = int(left.min()), self.config.search.depth
        if least < depth:
            raise ConfigError(
                f"'{self.title}': search.depth {depth} of a corpus of {len(self.found)} documents, "
                f"of which a query has {least} without its known ones; set search.depth={max(least, 0)} or less, or "
                "add documents to its corpus"
            )
        if any("surface" in rule.reads for rule in self.rules):
            for side, kinds in self.found.summary["kinds"].items():
                for kind in sorted(set(kinds) - {"text"}):
                    raise ConfigError(f"rules: 'debcse' compares words; {side} of '{self.title}' have {kind}")

    def run(self) -> Mined:
        """All steps."""
        config = self.config
        self.vectors = encoded(self.place, "retriever", config.search.precision)
        clusters = self._clusters()
        shards = self._search()
        parts = []
        with self._bar("choose", shards.rows, " queries") as shown:
            for number in range(len(shards.keys)):
                span = shards.span(number)
                parts.append(self._choose(number, span, shards.read(number), clusters))
                shown.update(span.stop - span.start)
        mined = _joined(parts, self.found.positives.shape[1], config.negatives)
        if clusters is not None:
            new = {output: count for output, (_, count) in zip(config.earlier, self.earlier, strict=True)}
            mined.clusters = {"stages": 1 + len(new), "count": len(np.unique(clusters)), "new": new}
        return mined

    # Search ----------------------------------------------------------------------------------------------------------

    def _search(self) -> Shards:
        """For each query what was found, then the known rows, with their scores."""
        search, found, count = self.config.search, self.found, len(self.found)
        wanted = min(count, search.depth + int((self.known >= 0).sum(axis=1).max(initial=0)))
        settings = [search.index, search.options, search.similarity, search.precision, wanted]
        corpus = digest(self.models.of_retriever, settings, found.corpus_digests)
        starts = range(0, len(self.known), search.queries)
        keys = [
            digest(
                corpus, found.query_digests[start : start + search.queries], self.known[start : start + search.queries]
            )
            for start in starts
        ]
        shards = Shards(self.work, "found", len(self.known), search.queries, keys)
        missing = list(shards.missing())
        with self._bar("search", shards.rows, " queries", shards.complete) as shown:
            index = self._index() if missing else None
            for number, span in missing:
                hits, known_scores = self._find(index, span, wanted)
                table = np.empty((len(hits.scores), wanted + self.known.shape[1]), FOUND)
                table["row"] = np.concatenate([hits.indices, self.known[span]], axis=1)
                table["score"] = np.concatenate([hits.scores, known_scores], axis=1)
                shards.write(number, table)
                self.models.keep("retriever")
                shown.update(span.stop - span.start)
        self.models.keep("retriever")
        return shards

    def _index(self) -> FaissIndex | None:
        search = self.config.search
        if self.vectors is None:
            self._index_words()
            return None
        if search.index == "exact":
            return None
        options: dict[str, Any] = {"similarity": search.similarity, "device": search.device, **search.options}
        make = partial(FaissIndex, self.vectors[1], search.index, **options)
        return make() if search.index == "flat" else self._kept(make)  # a flat index is made as fast as it is read

    def _kept(self, make: Callable[..., FaissIndex]) -> FaissIndex:
        """The index that an earlier process built of the same, or else a new one, which is kept."""
        search = self.config.search
        options = {name: value for name, value in search.options.items() if name not in SEARCH_OPTIONS}
        settings = [search.index, options, search.similarity, search.precision]
        key = digest(self.models.of_retriever, settings, self.found.corpus_digests)
        file = self.work / f"index-{key[:16]}.faiss"
        if file.exists():
            try:
                return make(saved=file)
            except MmembedError as error:
                logger.warning("'%s': the index that was kept cannot be used: %s", self.title, error)
        index = make()
        for old in self.work.glob("*index-*.faiss*"):  # of other settings, or half written when a process was killed
            old.unlink()
        try:
            index.save(file)
        except OSError as error:  # a full disk: it is large, and the search does without
            logger.warning("'%s': the index is not kept (%s), a kill would lose it", self.title, error)
        return index

    def _index_words(self) -> None:
        assert isinstance(self.retriever, Lexical), f"{self.retriever.name} has neither vectors nor a search"
        self.retriever.index(self.found.items("corpus", range(len(self.found))))
        self._indexed = True

    def _find(self, index: FaissIndex | None, span: slice, wanted: int) -> tuple[Hits, Floats]:
        search = self.config.search
        if self.vectors is None:
            assert isinstance(self.retriever, Lexical), "it has been indexed"
            items = self.found.items("queries", range(span.start, span.stop))
            return self.retriever.search(items, wanted, self.known[span])
        queries, corpus = self.vectors[0][span], self.vectors[1]
        if index is None:
            hits = top_k(queries, corpus, wanted, similarity=search.similarity, device=search.device)
        else:
            hits = index.top_k(queries, wanted)
        return hits, pair_scores(queries, corpus, self.known[span], similarity=search.similarity)

    def _clusters(self) -> Rows | None:
        """Of all stages; those of this one are written for the runs after it."""
        output, name = Path(self.config.output), self.work.name
        if self.config.clusters is None:
            remove_stage(output, name)
            return None
        own = next_stage(self.vectors[1], self.config.seed, self.config.clusters)
        write_stage(output, name, self.found.corpus_keys, own)
        return joined([*(numbers for numbers, _ in self.earlier), own])

    # The choice -------------------------------------------------------------------------------------------------------

    def _choose(self, number: int, span: slice, table: NDArray[Any], clusters: Rows | None) -> Mined:
        config, known, count = self.config, self.known[span], self.found.positives.shape[1]
        wanted = table.shape[1] - known.shape[1]
        rows, scores = table["row"][:, :wanted], table["score"][:, :wanted]
        known_scores = table["score"][:, wanted:]
        found = Candidates.of(
            rows, scores, known[:, :count], len(self.found), keys=self.found.keys[span],
            positive_scores=known_scores[:, :count], clusters=clusters, barred=known[:, count:],
        ).first(config.search.depth)  # fmt: skip
        removed = {"known positives and barred documents": int((rows >= 0).sum() - self._unknown(rows, known).sum())}
        judged, known_judged, chosen_by = None, None, found
        if self.models.teacher is not None and config.rescore == "candidates":
            given = self.judge.scores(f"candidates-{number:05d}", span, np.concatenate([found.rows, known], axis=1))
            judged, known_judged = given[:, : found.rows.shape[1]], given[:, found.rows.shape[1] :]
            chosen_by = found.rescored(judged, known_judged[:, :count])
        if any("surface" in rule.reads for rule in self.rules):
            chosen_by = self._with_surface(chosen_by, span)
        if any("owners" in rule.reads for rule in self.rules):
            queries, similarity = self.vectors[0], config.search.similarity
            chosen_by = with_owners(
                chosen_by, queries[span], queries, self.found.positives, span.start, similarity=similarity
            )
        for rule in self.rules:
            if rule.role == "filter":
                lost = int((chosen_by.valid & ~rule.keep(chosen_by)).sum())
                removed[f"rule {rule.name}"] = lost
        negatives = mine(chosen_by, self.rules, config.negatives, config.seed)
        ranks = _places(found.rows, negatives)
        filled = (negatives >= 0) & (ranks < 0)
        own_scores = _taken(found.scores, ranks)
        own_scores = self._scores_of_filled(own_scores, np.where(filled, negatives, -1), span)
        own_judged = None
        if judged is not None:
            own_judged = _taken(judged, ranks)
            if filled.any():  # no rule has asked the teacher about them
                more = self.judge.scores(f"filled-{number:05d}", span, np.where(filled, negatives, -1))
                own_judged = np.where(filled, more, own_judged)
        elif self.models.teacher is not None:
            given = self.judge.scores(f"chosen-{number:05d}", span, np.concatenate([negatives, known], axis=1))
            own_judged, known_judged = given[:, : config.negatives], given[:, config.negatives :]
        first = found.scores[:, 0] if found.scores.shape[1] else np.full(len(known), np.nan, np.float32)
        return Mined(
            negatives, own_scores, own_judged, known, known_scores, known_judged, filled, ranks,
            np.where(np.isfinite(first), first, np.nan), count, removed,
        )  # fmt: skip

    @staticmethod
    def _unknown(rows: Rows, known: Rows) -> NDArray[np.bool_]:
        there: NDArray[np.bool_] = rows >= 0
        for column in range(known.shape[1]):
            there &= rows != np.where(known[:, column] >= 0, known[:, column], -2)[:, None]
        return there

    def _scores_of_filled(self, scores: Floats, filled: Rows, span: slice) -> Floats:
        """With the retriever's scores of rows that it did not find among the best."""
        if not (filled >= 0).any():
            return scores
        if self.vectors is not None:
            search = self.config.search
            given = pair_scores(self.vectors[0][span], self.vectors[1], filled, similarity=search.similarity)
        else:
            if not self._indexed:
                self._index_words()
            assert isinstance(self.retriever, Lexical), "it has no vectors"
            items = self.found.items("queries", range(span.start, span.stop))
            given = self.retriever.search(items, 1, filled)[1]
        return np.where(filled >= 0, given, scores)

    def _with_surface(self, candidates: Candidates, span: slice) -> Candidates:
        rows = np.unique(candidates.rows[candidates.valid])
        texts = dict(zip(rows.tolist(), (item.text for item in self.found.items("corpus", rows)), strict=True))
        surface = np.zeros(candidates.rows.shape, np.float32)
        queries = self.found.items("queries", range(span.start, span.stop))
        for query, place in np.argwhere(candidates.valid).tolist():
            surface[query, place] = shared_words(queries[query].text, texts[int(candidates.rows[query, place])])
        return replace(candidates, surface=surface)

    def _bar(self, what: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
        return self.place.bar(what, total, unit, done)


def _places(rows: Rows, chosen: Rows) -> Rows:
    """Where each chosen row is among the candidates; -1 where it is not: (q, C), (q, K) -> (q, K)."""
    places = np.full(chosen.shape, -1, np.int64)
    for column in range(chosen.shape[1]):
        same = (rows == chosen[:, column, None]) & (rows >= 0)
        places[:, column] = np.where(same.any(axis=1), same.argmax(axis=1), -1)
    return places


def _taken(scores: Floats, places: Rows) -> Floats:
    """(q, C), (q, K) -> (q, K), NaN where a place is -1."""
    if not scores.shape[1]:
        return np.full(places.shape, np.nan, np.float32)
    return np.where(places >= 0, np.take_along_axis(scores, np.maximum(places, 0), axis=1), np.nan).astype(np.float32)


def _joined(parts: list[Mined], positives: int, count: int) -> Mined:
    def join(name: str) -> Any:
        values = [vars(part)[name] for part in parts]
        return None if values[0] is None else np.concatenate(values)

    removed: dict[str, int] = {}
    for part in parts:
        for key, number in part.removed.items():
            removed[key] = removed.get(key, 0) + number
    names = ("negatives", "scores", "judged", "known", "known_scores", "known_judged", "filled", "ranks", "first")
    return Mined(**{name: join(name) for name in names}, positives=positives, removed=removed)
