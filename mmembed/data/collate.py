"""Examples -> a batch of chunks, planned before any tensor exists.

A batch is a list of tokenized inputs (queries, then documents), each distinct input once, sorted by length across both
sides and cut into chunks under a token budget (visual tokens counted from file headers). A chunk becomes tensors only
when the model is about to read it, so the pictures of one chunk at a time are in memory. Sorting across sides
leaves a few per cent of padding (docs/log.md, chunk size).

Everything is a pure function of the examples and the seed: which negatives are drawn depends on the record and on how
often it was drawn before, not on its neighbours in the batch, so not on the number of processes, on workers or on a
resume.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmembed.config.blocks import SourceConfig
from mmembed.content import Audio, Content, Document, Example, Image, Role, Task, Text, Video
from mmembed.data.labels import BatchLabels, label_keys, label_values
from mmembed.data.prefixes import Group, group_by_prefix
from mmembed.data.records import is_untrainable_pair
from mmembed.errors import MediaError, MmembedError, RecordError
from mmembed.preprocess import Item, ModelInputs, Place, Preprocessor, Row

if TYPE_CHECKING:
    import PIL.Image

UNPACKED = 2  # budgets that the last hidden states of a packed chunk may take: these are padded again, for the pooling


@dataclass(frozen=True)
class Chunk:
    """Inputs that go through the model together.

    index: (n,) long, their positions among the distinct inputs.
    where: `file:line` of a record each input is of, for error messages.
    shared: how many first tokens all rows have in common, which the model computes once.
    packed: whether the model computes no padding: rows of different lengths stand one behind the other.
    """

    index: Tensor
    rows: tuple[Row, ...]
    where: tuple[str, ...] = ()
    shared: int = 0
    packed: bool = False

    @property
    def padded_tokens(self) -> int:
        """What is shared, and rows times the rest of the longest; of a packed chunk its tokens."""
        if self.packed:
            return sum(map(len, self.rows))
        own = len(self.rows) * (max(len(row) for row in self.rows) - self.shared)
        return self.shared + own + self.tail_tokens

    @property
    def tail_tokens(self) -> int:
        """Of the last block of a list."""
        return 0 if self.rows[0].tail is None else len(self.rows[0].tail.ids)

    @property
    def saved_tokens(self) -> int:
        """Tokens that the rows have and the model does not compute."""
        return self.shared * (len(self.rows) - 1)

    def inputs(self, preprocessor: Preprocessor) -> ModelInputs:
        """Pads the rows and opens their media, now.

        Raises:
            RecordError: a picture cannot be opened; a MediaError where the records are not known.
        """
        try:
            return preprocessor.collate(self.rows, shared=self.shared, packed=self.packed)
        except MediaError as error:
            raise name_record(error, self.where, lambda index: preprocessor.collate([self.rows[index]])) from None


@dataclass(frozen=True)
class Batch:
    """Q queries and D documents, as U distinct inputs in chunks.

    place: (Q + D,) long, the distinct input of each query, then of each document.
    """

    n_queries: int
    n_documents: int
    chunks: tuple[Chunk, ...]
    place: Tensor
    labels: BatchLabels

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(chunk.tail_tokens + sum(map(len, chunk.rows)) for chunk in self.chunks)

    @property
    def padded_tokens(self) -> int:
        return sum(chunk.padded_tokens for chunk in self.chunks)

    @property
    def saved_tokens(self) -> int:
        """Tokens of shared prefixes that are not computed again."""
        return sum(chunk.saved_tokens for chunk in self.chunks)


class Collator:
    """list[Example] of one source -> Batch.

    Args:
        preprocessor: tokenizes; it goes to data workers with the collator.
        sources: by name, for the document instruction and whether in-batch negatives are on.
        chunk_tokens: padded tokens a chunk.
        chunk_rows: inputs a chunk, or no bound.
        train_group_size: documents a query; `positives_per_query` of them positive. Fewer where the record has fewer:
            nothing is repeated to fill a group.
        share_prefix: plan chunks whose rows begin with the same tokens, for a model that computes these once.
        packed: plan chunks of texts that share nothing without their padding, for a model that computes none.
        graded: names of sources whose objective takes graded pairs (STS): of them all documents of a record come, each
            with its similarity, whatever the size of groups.
        apart: names of sources whose pairs differ by dropout: no beginning of their inputs is computed once for
            several, or these would have one mask.
        predicted: by source, the roles whose texts its objective's language-model loss predicts.
        positives_only: names of sources whose objective takes no negatives: none are drawn, nor encoded.
        guides: by source, what gives the vectors of another embedder of its inputs.
        judges: inputs are pairs of a query and one of its documents, for a reranker; a query stands at the place of its
            first pair. Where the prompt reads lists, the documents of a query are one, in an order drawn for it.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        sources: Mapping[str, SourceConfig],
        chunk_tokens: int,
        chunk_rows: int | None = None,
        train_group_size: int = 8,
        positives_per_query: int = 1,
        seed: int = 0,
        share_prefix: bool = False,
        packed: bool = False,
        graded: Collection[str] = (),
        apart: Collection[str] = (),
        predicted: Mapping[str, Collection[Role]] | None = None,
        positives_only: Collection[str] = (),
        guides: Mapping[str, Callable[[Sequence[Item]], Tensor]] | None = None,
        judges: bool = False,
    ) -> None:
        self.judges = judges
        self.guides: Mapping[str, Callable[[Sequence[Item]], Tensor]] = dict(guides or {})
        self.preprocessor, self.sources = preprocessor, sources
        self.graded, self.apart = frozenset(graded), frozenset(apart)
        self.predicted, self.positives_only = dict(predicted or {}), frozenset(positives_only)
        self.share_prefix, self.packed = share_prefix, packed
        self.chunk_tokens, self.chunk_rows = chunk_tokens, chunk_rows
        self.train_group_size, self.positives_per_query, self.seed = train_group_size, positives_per_query, seed

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Raises RecordError where a record has no positive, a pair no similarity from 0 to 1, or a picture is gone;
        ConfigError from the preprocessor."""
        source = self.sources[examples[0].source]
        groups = [self._group(example) for example in examples]
        documents = [document for group in groups for document in group]
        owners = [query for query, group in enumerate(groups) for _ in group]
        origins = [examples[query].where for query in owners]
        if self.judges:
            places = self._places(groups)
            pairs = zip(owners, documents, places, strict=True)
            items = [Item.of_pair(examples[query], one, place) for query, one, place in pairs]
        else:
            items = [Item.of_query(example) for example in examples]
            items += [Item.of_document(document, source.document_instruction, source.domain) for document in documents]
            origins = [*(example.where for example in examples), *origins]
        named = self._by_content([(*item.content, *(item.document or ())) for item in items], origins)
        keys = [content_key(content) for content in named]
        distinct: dict[tuple[int, int, str, str | None, Place | None], int] = {}
        place = [
            distinct.setdefault((key, len(item.content), item.role, item.instruction, item.place), len(distinct))
            for key, item in zip(keys, items, strict=True)
        ]
        first = {position: index for index, position in reversed(list(enumerate(place)))}
        chosen = [first[position] for position in range(len(distinct))]
        where = [origins[index] for index in chosen]
        roles = self.predicted.get(examples[0].source, ())
        rows = tokenize(self.preprocessor, [items[index] for index in chosen], where, roles)
        if self.preprocessor.features is not None:
            rows = [replace(row, digests=_digests(named[index])) for row, index in zip(rows, chosen, strict=True)]
        if self.judges:
            firsts = itertools.accumulate(map(len, groups[:-1]), initial=0)  # every query has a document
            place = [place[one] for one in firsts] + place
        guide = self.guides.get(source.name)
        labels = BatchLabels(
            owner=torch.tensor(owners),
            relevance=torch.tensor([document.relevance for document in documents]),
            document_keys=torch.tensor([document_keys(document) for document in documents]),
            query_keys=torch.tensor([content_key(example.query) for example in examples]),
            positive_keys=_positive_keys(examples),
            in_batch=source.in_batch_negatives and examples[0].source not in self.graded and not self.judges,
            source=examples[0].source,
            scores=torch.tensor([math.nan if one.score is None else one.score for one in documents]),
            task=examples[0].task,
            label_keys=label_keys([example.labels for example in examples]),
            label_values=label_values([example.labels for example in examples]),
            guide=None if guide is None else (guide(items[: len(examples)]), guide(items[len(examples) :])),
        )
        shares = self.share_prefix and source.name not in self.apart
        limits = [self.preprocessor.shareable(row) for row in rows] if shares else None
        chunks = plan_chunks(rows, self.chunk_tokens, self.chunk_rows, where, limits, self.packed)
        return Batch(len(examples), len(documents), chunks, torch.tensor(place), labels)

    def _places(self, groups: Sequence[Sequence[Document]]) -> list[Place | None]:
        """Of each document in its query's list, with the list's answer; None where the prompt reads no lists."""
        if not self.preprocessor.prompt.reads_lists:
            return [None for group in groups for _ in group]
        places: list[Place | None] = []
        for number, group in enumerate(groups):
            best_first = sorted(range(len(group)), key=lambda one: -group[one].relevance)
            answer = tuple(one + 1 for one in best_first if group[one].relevance > 0)
            places += [Place(number, one + 1, answer) for one in range(len(group))]
        return places

    def _by_content(self, contents: Sequence[Content], where: Sequence[str]) -> list[Content]:
        """Contents with the digest of each picture in place of its source: one picture under two names is one input.

        Reads the files. The step reads those again that it decodes, from the page cache (20 us each); with a store of
        image features it decodes what the store lacks. URLs keep their names.
        """
        media = self.preprocessor.media

        def named(image: Image) -> Image:
            remote = isinstance(image.source, str) and "://" in image.source
            return image if remote else Image(media.digest(image))

        def read(index: int) -> Content:
            return tuple(
                named(part)
                if isinstance(part, Image)
                else Video(tuple(map(named, part.frames)))
                if isinstance(part, Video)
                else part
                for part in contents[index]
            )

        try:
            return [read(index) for index in range(len(contents))]
        except MediaError as error:
            raise name_record(error, where, read) from None

    def _group(self, example: Example) -> list[Document]:
        """The documents drawn for one query: positives first; all of them, as they stand, where they are graded."""
        if example.source in self.graded:
            return self._pairs(example)
        positives = [document for document in example.documents if document.relevance > 0]
        negatives = [document for document in example.documents if document.relevance <= 0]
        if not positives:
            raise RecordError(
                example.where,
                "no document has a relevance above 0",
                "Contrastive training needs a positive: correct or remove the record",
            )
        if is_untrainable_pair(example):
            raise RecordError(
                example.where,
                f"an STS pair of relevance {positives[0].relevance:.2f} is neither positive nor negative",
                "Set the source's options: {at_least: ...} so that only similar pairs are trained on",
            )
        generator = random.Random(f"{self.seed}:{example.visit}:{example.where}")
        group = _draw(positives, self.positives_per_query, generator)
        if example.source in self.positives_only:
            return group
        group += _draw(negatives, self.train_group_size - self.positives_per_query, generator)
        if self.preprocessor.prompt.reads_lists:
            generator.shuffle(group)  # or the answer would always be the first
        return group

    @staticmethod
    def _pairs(example: Example) -> list[Document]:
        highest = max(document.relevance for document in example.documents)
        if example.task is not Task.STS or highest > 1:
            found = f"a relevance of {highest:g} in a record of task '{example.task}'"
            raise RecordError(
                example.where, found, "Graded pairs have task sts and similarities from 0 to 1: correct the record"
            )
        return list(example.documents)


def tokenize(
    preprocessor: Preprocessor, items: Sequence[Item], where: Sequence[str], predict: Collection[Role] = ()
) -> list[Row]:
    """Rows of items. Raises RecordError naming the record whose picture's header cannot be read."""
    try:
        return preprocessor.tokenize(items, predict)
    except MediaError as error:
        raise name_record(error, where, lambda index: preprocessor.tokenize([items[index]])) from None


def name_record(error: MediaError, where: Sequence[str], attempt: Callable[[int], object]) -> MmembedError:
    """The error with the record in front: of the first input whose `attempt` fails. The same error if none does."""
    for index, origin in enumerate(where):
        try:
            attempt(index)
        except MediaError as found:
            remedy = "To go on without such records set data.on_bad_record: skip"
            return RecordError(origin, str(found), remedy, f"image {found.kind}")
    return error


def plan_chunks(
    rows: Sequence[Row],
    chunk_tokens: int,
    chunk_rows: int | None = None,
    where: Sequence[str] = (),
    shareable: Sequence[int] | None = None,
    packed: bool = False,
) -> tuple[Chunk, ...]:
    """Cuts rows into chunks, longest first, rows of one kind (media, domain) apart from others.

    Args:
        chunk_tokens: padded tokens of a chunk stay below it, a shared prefix counted once; a longer row is a chunk of
            its own.
        chunk_rows: at most so many rows.
        where: the record each row is of.
        shareable: of each row, how many first tokens it may share with others; None shares nothing.
        packed: rows without media that share nothing go through the model without padding, and none is counted as long
            as the rows would fit `UNPACKED` budgets with it.

    The documents of a list are a chunk, whatever its size.
    """
    if rows and rows[0].tail is not None:
        return _lists(rows, where)
    chunks: list[tuple[int, list[int], bool]] = []  # shared prefix, rows, packed
    for kind in sorted({row.kind for row in rows}):
        alike = [index for index, row in enumerate(rows) if row.kind == kind]
        pictured = any(rows[alike[0]].media)
        groups = [Group(0, tuple(range(len(alike))))]
        if shareable is not None:
            limits = [shareable[index] for index in alike]
            groups = group_by_prefix([rows[index].ids for index in alike], limits, chunk_tokens)
        found = [
            (group.prefix, cut, packed and not pictured and not group.prefix)
            for group in groups
            for cut in _cut(
                [alike[at] for at in group.rows],
                rows,
                group.prefix,
                chunk_tokens,
                chunk_rows,
                packed and not pictured and not group.prefix,
            )
        ]
        chunks += sorted(found, key=lambda chunk: -len(rows[chunk[1][0]]))
    return tuple(
        Chunk(
            torch.tensor(chunk),
            tuple(rows[index] for index in chunk),
            tuple(where[index] for index in chunk) if where else (),
            shared if len(chunk) > 1 else 0,
            without_padding,
        )
        for shared, chunk, without_padding in chunks
    )


def _lists(rows: Sequence[Row], where: Sequence[str]) -> tuple[Chunk, ...]:
    """A chunk of each list, the longest first."""
    of_list: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        assert row.tail is not None, "rows of a prompt that reads lists"
        of_list.setdefault(row.tail.list, []).append(index)
    chunks = [
        Chunk(
            torch.tensor(of),
            tuple(rows[index] for index in of),
            tuple(where[index] for index in of) if where else (),
            tail.prefix,
        )
        for of in of_list.values()
        if (tail := rows[of[0]].tail) is not None
    ]
    return tuple(sorted(chunks, key=lambda chunk: -chunk.padded_tokens))


def _cut(
    indices: Sequence[int],
    rows: Sequence[Row],
    prefix: int,
    chunk_tokens: int,
    chunk_rows: int | None,
    packed: bool = False,
) -> list[list[int]]:
    """Indices of rows that share `prefix` tokens, longest first, in lists that keep the two bounds."""
    chunks: list[list[int]] = []
    tokens = prefix  # of the last chunk
    for index in sorted(indices, key=lambda index: -len(rows[index])):
        last = chunks[-1] if chunks else [index]
        longest = len(rows[last[0]])
        own = (len(rows[index]) if packed else longest) - prefix
        if (
            not chunks
            or tokens + own > chunk_tokens
            or (packed and (len(last) + 1) * longest > UNPACKED * chunk_tokens)
            or (chunk_rows is not None and len(last) >= chunk_rows)
        ):
            chunks.append([])
            tokens, own = prefix, len(rows[index]) - prefix
        chunks[-1].append(index)
        tokens += own
    return chunks


def _digests(named: Content) -> tuple[bytes, ...]:
    """Digests of the pictures of a content of `_by_content`, in order; none where one is a URL, which has no digest."""
    frames = [part.frames if isinstance(part, Video) else (part,) for part in named if isinstance(part, Image | Video)]
    sources = [image.source for some in frames for image in some]
    found = tuple(source for source in sources if isinstance(source, bytes))
    return found if len(found) == len(sources) else ()


def content_key(content: Content) -> int:
    """64 bits of a hash of the content: equal contents, equal keys. Files count by their name."""
    return int.from_bytes(content_digest(content, 8), "little", signed=True)


def content_digest(content: Content, size: int) -> bytes:
    """`size` bytes of a hash of the content. Files count by their name."""
    digest = hashlib.blake2b(digest_size=size)
    for part in content:
        if isinstance(part, Text):
            digest.update(b"text" + part.text.encode())
        elif isinstance(part, Image):
            _update_image(digest, part)
        elif isinstance(part, Audio):
            digest.update(b"audio" + (part.source.encode() if isinstance(part.source, str) else part.source.tobytes()))
        else:
            digest.update(b"video")
            for frame in part.frames:
                _update_image(digest, frame)
        digest.update(b"\0")
    return digest.digest()


def document_keys(document: Document) -> tuple[int, int]:
    """Keys of the content and of the id; without an id, of the content twice."""
    key = content_key(document.content)
    return key, key if document.id is None else content_key((Text("id " + document.id),))


def _update_image(digest: hashlib.blake2b, image: Image) -> None:
    source: str | bytes | PIL.Image.Image = image.source
    if isinstance(source, str):
        digest.update(b"path" + source.encode())
    elif isinstance(source, bytes):
        digest.update(b"bytes" + source)
    else:
        digest.update(f"pixels {source.mode} {source.size}".encode() + source.tobytes())


def _positive_keys(examples: Sequence[Example]) -> Tensor:
    """(Q, P, 2): rows with fewer positives repeat their first; one without, the query itself, which never counts."""
    keys = [
        [document_keys(document) for document in example.documents if document.relevance > 0] for example in examples
    ]
    keys = [row or [(content_key(one.query),) * 2] for row, one in zip(keys, examples, strict=True)]
    width = max(len(row) for row in keys)
    return torch.tensor([row + row[:1] * (width - len(row)) for row in keys])


def _draw(documents: list[Document], count: int, generator: random.Random) -> list[Document]:
    """At most `count` of them, drawn at random, in their order."""
    if len(documents) <= count:
        return documents
    return [documents[place] for place in sorted(generator.sample(range(len(documents)), count))]
