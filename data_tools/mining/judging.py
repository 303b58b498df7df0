"""What models say of one source, computed once: vectors of its contents, and a teacher's scores of its pairs.

Both are kept in shards (`mmembed.shards`) below the source's work folder, each under a digest of what it depends on, so
a killed run computes none twice. Vectors may be computed by workers of a cluster. A teacher of many vectors encodes
each content once (`tokens.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.files import digest
from data_tools.mining.collection import Collection
from data_tools.mining.models import Models
from data_tools.mining.retrievers import RETRIEVERS, Encoder, Item
from data_tools.mining.teachers import TEACHERS, PairTeacher
from data_tools.mining.teachers.embedder import EmbedderTeacher
from data_tools.mining.teachers.late_interaction import LateInteraction
from data_tools.mining.tokens import TokenStore
from mmembed.config.blocks import TypedBlock
from mmembed.content import Role
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.progress import bar
from mmembed.quantize import quantize
from mmembed.search import pair_scores, rescore_maxsim
from mmembed.shards import Shards
from mmembed.workers import Workers, spread

PAIRS = 4096  # pairs that a teacher scores at a time; a kill loses so many at most
Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """A source that models read.

    work: the folder of its shards. shard: contents encoded at a time. workers: that encode; None is this process.
    """

    title: str
    found: Collection
    media: MediaStore
    models: Models
    work: Path
    shard: int
    workers: Workers | None = None

    def check_kinds(self) -> None:
        """Raises ConfigError where contents are of a kind that a model does not read."""
        for what, one in (("retriever", self.models.retriever), ("teacher", self.models.teacher)):
            if one is None:
                continue
            for side, kinds in self.found.summary["kinds"].items():
                for kind in sorted(set(kinds) - one.reads):
                    raise ConfigError(
                        f"{what} '{one.name}' reads {', '.join(sorted(one.reads))}; {side} of '{self.title}' have "
                        f"{kind} (first at {kinds[kind]}): choose another {what}"
                    )

    def bar(self, what: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
        return bar(f"{self.title}: {what}", total, unit, done, delay=1.0)


def encoded(place: Place, name: Literal["retriever", "teacher"], precision: Any = "float32") -> Any:
    """The vectors of queries and corpus that it gives, mapped; None of one without.

    Raises:
        MmembedError: NaN or infinity, vectors of two sizes.
    """
    models, found = place.models, place.found
    one, of = (models.retriever, models.of_retriever) if name == "retriever" else (models.teacher, models.of_teacher)
    encoder = one.encoder if isinstance(one, EmbedderTeacher) else one
    if one is None or not isinstance(encoder, Encoder):
        return None
    roles: tuple[tuple[str, Role, NDArray[Any]], ...] = (
        ("queries", "query", found.query_digests),
        ("corpus", "document", found.corpus_digests),
    )
    made, size = [], place.shard
    for side, role, digests in roles:
        starts = range(0, len(digests), size)
        keys = [digest(of, role, precision, digests[start : start + size]) for start in starts]
        shards = Shards(place.work, f"{name}-{side}", len(digests), size, keys)
        missing = [number for number, _ in shards.missing()]
        job = _Job(name, models.block(name), found.folder.absolute(), place.media, side, role, size, precision)
        if place.workers is None and missing:
            models.load(one, place.media)
        make = partial(job.begin, found, encoder) if place.workers is None else partial(job.begin)
        what = f"encode {side}{' for the teacher' if name == 'teacher' else ''}"
        with place.bar(what, len(digests), " contents", shards.complete) as shown:
            for number, (vectors, probe) in spread(missing, make, place.workers):
                if place.workers is not None:
                    models.check(name, probe)
                shards.write(number, vectors)
                models.keep(name)
                shown.update(len(vectors))
        models.keep(name)  # an earlier process may have died before it did
        made.append(shards.open())
    if made[0].shape[1] != made[1].shape[1]:
        raise MmembedError(
            f"{name}: queries have {made[0].shape[1]} dimensions, documents {made[1].shape[1]}; use one model"
        )
    return tuple(made)


@dataclass(frozen=True)
class _Job:
    """The encoding of one side of a source, as a worker has to know it."""

    name: Literal["retriever", "teacher"]
    block: TypedBlock
    folder: Path  # of the collection
    media: MediaStore
    side: str
    role: Role
    size: int  # contents of a shard
    precision: Any

    def begin(self, found: Collection | None = None, encoder: Encoder | None = None) -> Callable[[int], Any]:
        """What gives the vectors of a shard, with that of a fixed text where the encoder is one of a worker."""
        probe = None
        if found is None or encoder is None:
            found = Collection(self.folder)
            one: Any = RETRIEVERS.build(self.block) if self.name == "retriever" else TEACHERS.build(self.block)
            encoder = one.encoder if isinstance(one, EmbedderTeacher) else one
            assert isinstance(encoder, Encoder), "only vectors are computed by workers"
            encoder.load(self.media)
            probe = encoder.probe()
        return lambda number: (self.encode(found, encoder, number), probe)

    def encode(self, found: Collection, encoder: Encoder, number: int) -> NDArray[Any]:
        """The vectors of a shard (n, W). Raises MmembedError: NaN or infinity."""
        count = len(found.query_digests if self.side == "queries" else found.corpus_digests)
        items = found.items(self.side, range(number * self.size, min(count, (number + 1) * self.size)))
        vectors = encoder.encode(items, self.role)
        _check_finite(vectors, items, self.name)
        if self.precision == "binary" and vectors.shape[1] % 8:
            raise ConfigError(f"search.precision 'binary': {vectors.shape[1]} dimensions are no multiple of 8")
        return quantize(vectors, self.precision)


class Judge:
    """The teacher's scores of a source's pairs.

    Args:
        precision: in which the vectors of an embedder that teaches are kept.
    """

    def __init__(self, place: Place, precision: Any = "float32") -> None:
        self.place, self.models, self.found, self.precision = place, place.models, place.found, precision
        self._vectors: Any = None  # of queries and corpus, of an embedder that teaches
        self._tokens: dict[str, TokenStore] = {}  # of queries and corpus, of a teacher of many vectors

    def scores(self, name: str, span: slice, rows: Rows) -> Floats:
        """Of the queries of `span` with their rows of the corpus: (q, w) -> (q, w), NaN where a row is -1.

        Args:
            name: of the shards that keep them.
        """
        teacher = self.models.teacher
        if isinstance(teacher, EmbedderTeacher):
            if self._vectors is None:
                self._vectors = encoded(self.place, "teacher", self.precision)
            queries, corpus = self._vectors
            return pair_scores(queries[span], corpus, rows)
        size = max(1, PAIRS // max(1, rows.shape[1]))
        digests = self.found.query_digests[span], self.found.corpus_digests
        keys = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            keys.append(
                digest(self.models.of_teacher, part, digests[0][start : start + size], digests[1][part[part >= 0]])
            )
        shards = Shards(self.place.work, name, len(rows), size, keys)
        missing = list(shards.missing())
        if missing and isinstance(teacher, LateInteraction):
            left = np.full(rows.shape, -1)
            for _, part_span in missing:
                left[part_span] = rows[part_span]
            self._encode_tokens(teacher, "queries", "query", span.start + np.flatnonzero((left >= 0).any(axis=1)))
            self._encode_tokens(teacher, "corpus", "document", np.unique(left[left >= 0]))
        elif missing:
            assert teacher is not None, "there is one"
            self.models.load(teacher, self.place.media)
        with self.place.bar("teacher", int((rows >= 0).sum()), " pairs") as shown:
            done = set(range(len(keys))) - {number for number, _ in missing}
            shown.update(sum(int((rows[shards.span(number)] >= 0).sum()) for number in done))
            for number, part_span in missing:
                part = rows[part_span]
                places = range(span.start + part_span.start, span.start + part_span.stop)
                shards.write(number, self._score(places, part))
                self.models.keep("teacher")
                shown.update(int((part >= 0).sum()))
        self.models.keep("teacher")
        return np.array(shards.open())

    def _score(self, places: range, rows: Rows) -> Floats:
        """The teacher's scores of the queries at `places` (q,) with their rows (q, w)."""
        teacher = self.models.teacher
        if isinstance(teacher, LateInteraction):
            return self._maxsim(places, rows)
        assert isinstance(teacher, PairTeacher), "a teacher scores pairs or gives vectors"
        scores = np.full(rows.shape, np.nan, np.float32)
        of, place = np.nonzero(rows >= 0)
        if not len(of):
            return scores
        queries, documents = self.found.items("queries", places), self.found.items("corpus", rows[of, place])
        given = teacher.score([queries[query] for query in of.tolist()], documents)
        if given.shape != of.shape:
            raise MmembedError(
                f"teacher: scores of shape {given.shape} for {len(of)} pairs; give one with one score a pair"
            )
        if not np.isfinite(given).all():
            bad = int(np.flatnonzero(~np.isfinite(given))[0])
            raise MmembedError(f"teacher: the score of {queries[of[bad]]} with {documents[bad]} is {given[bad]}")
        scores[of, place] = given
        return scores

    def _encode_tokens(self, teacher: LateInteraction, side: str, role: Role, rows: Rows) -> None:
        """Those of the rows that are not there."""
        if side not in self._tokens:
            self._tokens[side] = TokenStore(self.place.work / f"teacher-{side}-tokens", self.models.of_teacher)
        store, keys = self._tokens[side], self._keys(side, rows)
        missing = [(row, key) for row, key in zip(rows.tolist(), keys, strict=True) if key not in store]
        if missing:
            self.models.load(teacher, self.place.media)
        size, done = self.place.shard, len(rows) - len(missing)
        with self.place.bar(f"encode {side} for the teacher", len(rows), " contents", done) as shown:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                items = self.found.items(side, [row for row, _ in part])
                store.add([key for _, key in part], teacher.encode(items, role))
                self.models.keep("teacher")
                shown.update(len(part))

    def _maxsim(self, places: range, rows: Rows) -> Floats:
        scores = np.full(rows.shape, np.nan, np.float32)
        for number, key in enumerate(self._keys("queries", np.array(places))):
            there = rows[number] >= 0
            own, place = np.unique(rows[number, there], return_inverse=True)
            if not len(own):
                continue
            documents = self._tokens["corpus"].take(self._keys("corpus", own))
            hits = rescore_maxsim(self._tokens["queries"].take([key]), documents, np.arange(len(own))[None])
            in_order = np.empty(len(own), np.float32)
            in_order[hits.indices[0]] = hits.scores[0]
            scores[number, there] = in_order[place]
        return scores

    def _keys(self, side: str, rows: Rows) -> list[bytes]:
        digests = self.found.query_digests if side == "queries" else self.found.corpus_digests
        return [one.tobytes() for one in digests[rows]]


def _check_finite(vectors: Floats, items: Sequence[Item], name: str) -> None:
    if vectors.shape[0] != len(items) or vectors.ndim != 2:
        raise MmembedError(f"{name}: vectors of shape {vectors.shape} for {len(items)} contents; give one each")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        raise MmembedError(
            f"{items[bad]}: the {name} gives NaN or infinity for it; load the model in float32, or leave it out"
        )
