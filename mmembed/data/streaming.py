"""Sources that are read while training goes on, instead of being copied into the cache first.

A stream is one endless sequence: passes over its shards (the files of its folder), each pass with the shards in a new
order and its records shuffled through a buffer of bounded size. The sequence is a function of the seed alone, and row n
of it is row n in every process: a BatchPlan deals positions of the sequence as it deals rows of other sources. So
processes share it out exactly, whatever the number of shards, processes and data workers; all take the same number of
steps, because a pass that ends in the middle of a batch goes over into the next one; and a resumed run asks for the
position it was at, which rebuilds the buffer by reading up to it.

Costs: `shuffle_buffer` records of memory in each process or data worker; each of them reads the whole stream (JSON, not
pictures) and checks the records that are its own, all of them under `on_bad_record: skip`, since who skips what decides
the position of all later records. Resuming reads up to two passes again, without checking them.

What cannot be known of a stream: how many records it has (so `training.max_steps` and, beside other sources, `weight`
are needed, and the run is one epoch), which records share a query or a positive (they may meet in a batch, where the
objective masks them as it masks duplicates), and what comes later: fields and tasks are those of its first records, and
a later record that carries more is an error. Pictures are looked at when a batch opens them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.content import Example, Task
from mmembed.data import dataset
from mmembed.data.census import Census
from mmembed.data.dataset import RecordDataset, base_folder, fields_of, ignored_media, locate, settle, usable
from mmembed.data.format_base import FORMATS, RawRecord
from mmembed.data.labels import Grades
from mmembed.data.pair_base import maker_of
from mmembed.data.records import is_untrainable_pair, parse_document, parse_record
from mmembed.errors import ConfigError, RecordError
from mmembed.media import MediaStore

SHUFFLE_BUFFER = 10_000
_DIGESTED = 2**16  # bytes at each end of a shard
_FIRST = 1_000  # records that are read to learn fields and tasks


def open_source(
    source: SourceConfig, data: DataConfig, media: MediaStore | None = None, seed: int = 0, objective: str = ""
) -> Source:
    """The records of a source, streamed where it says so.

    Args:
        objective: the name of what trains on it, for messages.

    Raises:
        RecordError: a record cannot be used; names file and line, source and objective.
        ConfigError: the source holds nothing, or options that do not fit it.
    """
    try:
        if source.streaming:
            return RecordStream(source, media, data.on_bad_record, data.root, seed, data.ignore_fields)
        return dataset.RecordDataset(source, media, data.on_bad_record, root=data.root, ignored=data.ignore_fields)
    except RecordError as error:
        of = f"data source '{source.name}'" + (f", objective '{objective}'" if objective else "")
        raise RecordError(error.where, error.found, f"{error.remedy} ({of})", error.kind) from error


class RecordStream(torch.utils.data.Dataset[Example]):
    """One streamed source: `stream[n]` is row n of its endless sequence. Rows are asked for in ascending order; going
    back reads from the start again.

    Args:
        source: path of a file or of a folder of shards, format, and what overrides the records.
        media: relative paths of pictures start from its root, else from the folder of the records.
        on_bad_record: as of RecordDataset, without its look at the pictures.
        root: what `source.path` is relative to.
        seed: of the order.
        ignored: `data.ignore_fields`: fields that later records may carry although the first ones do not; media among
            them are taken out, as of RecordDataset.

    Attributes:
        fields, tasks, grades, census, untrainable, skipped, maker: as of RecordDataset, of the first thousand records.
        least: rows that a pass has to have: a global batch.

    Raises:
        ConfigError: no such source or format, a format that cannot be streamed, no usable record, a pass that is
            shorter than `least`.
        RecordError: a bad record under `raise`, a record that carries a field, or is of a task, which none of the first
            ones is.
    """

    size = None  # nobody knows before it was read

    def __init__(
        self,
        source: SourceConfig,
        media: MediaStore | None = None,
        on_bad_record: str = "raise",
        root: str | Path | None = None,
        seed: int = 0,
        ignored: Sequence[str] = (),
    ) -> None:
        self.source, self.name, self.on_bad_record, self.ignored = (
            source,
            source.name,
            on_bad_record,
            frozenset(ignored),
        )
        self._left_out = ignored_media(ignored)
        self.maker = maker_of(source, ignored)
        path = locate(source, root)
        self._reader = FORMATS.build({"type": source.format, **source.options})
        if not self._reader.streamable:
            raise ConfigError(
                f"data source '{self.name}': format '{source.format}' needs all of its files at once; remove "
                "streaming, or write the records as jsonl or parquet"
            )
        self.shards = self._reader.files(path)
        self._root, self._base = path, base_folder(path, media)
        self._seed = (seed, int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little"))
        self._buffer = source.shuffle_buffer or SHUFFLE_BUFFER
        self.least = 1
        self.skipped: Counter[str] = Counter()
        self._length = 0  # of a pass, once one was read
        self._begin(0)
        examples = [self._example(record) for record in itertools.islice(self._read(self.shards), _FIRST)]
        if not examples:
            raise ConfigError(f"{path}: no usable record ({dict(self.skipped) or 'the source is empty'})")
        self.skipped.clear()  # they come again
        self.fields = {field for example in examples for field in fields_of(example)}
        self.fields |= self.maker.gives if self.maker is not None else set()
        self.tasks: set[Task] = {example.task for example in examples}
        self.grades = Grades()
        found = [document.relevance for example in examples for document in example.documents]
        for relevance in found if self.maker is None else self.maker.grades:
            self.grades.add(relevance)
        self.census = Census()
        for example in examples:
            self.census.add(example, self.maker)
        untrainable = [example.where for example in examples if self.maker is None and is_untrainable_pair(example)]
        self.untrainable = (len(untrainable), untrainable[0] if untrainable else "")

    def __getitem__(self, position: int) -> Example:
        if position < self._at or self._process != os.getpid():  # a forked worker would share the parent's open file
            self._begin(0)
        record, visit = self._next(position)
        example = self._example(record)
        for field in fields_of(example):
            if field not in self.fields | self.ignored:
                raise RecordError(
                    example.where,
                    f"carries '{field}', which none of the first {_FIRST:,} records of the stream does",
                    f"Let an early record carry it, or set data.ignore_fields: [{field}]",
                    "late field",
                )
        if example.task not in self.tasks:
            raise RecordError(
                example.where,
                f"is of task '{example.task}', which none of the first {_FIRST:,} records of the stream is",
                "Make it a source of its own, or set the source's task",
                "late task",
            )
        return dataclasses.replace(example, source=self.name, visit=visit, domain=self.source.domain)

    def _next(self, position: int) -> tuple[RawRecord, int]:
        """Reads on to a position. Where the length of a pass is known, whole passes are not read."""
        while True:
            if self._length and position // self._length > self._at // self._length:
                self._begin(position // self._length)
            found = next(self._rows)
            self._at += 1
            if self._at > position:
                return found

    def _begin(self, number: int) -> None:
        """Goes to the start of a pass."""
        self._process = os.getpid()
        self._at, self._rows = number * self._length, self._sequence(number)

    def keys(self) -> None:
        """Not known."""

    def digest(self) -> str:
        """Of each shard's name, size, beginning and end: the middle of terabytes is not read for it."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            size = shard.stat().st_size
            digest.update(json.dumps([shard.name, size]).encode())
            with shard.open("rb") as file:
                digest.update(file.read(_DIGESTED))
                file.seek(max(0, size - _DIGESTED))
                digest.update(file.read())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(0)

    def _sequence(self, first: int) -> Iterator[tuple[RawRecord, int]]:
        """(record, pass) from a pass on, for ever."""
        for visit in itertools.count(first):
            generator = np.random.default_rng((*self._seed, visit))
            count = 0
            for record in self._shuffled(generator):
                count += 1
                yield record, visit
            if count < self.least:
                raise ConfigError(
                    f"data source '{self.name}' has {count} rows, one batch takes {self.least}; lower "
                    "per_device_train_batch_size or use fewer processes, or remove the source"
                )
            self._length = count

    def _shuffled(self, generator: np.random.Generator) -> Iterator[RawRecord]:
        """One pass: each record takes the place of a random one of the buffer, which is the next."""
        buffer: list[RawRecord] = []
        for record in self._read(self.shards[index] for index in generator.permutation(len(self.shards))):
            if len(buffer) < self._buffer:
                buffer.append(record)
                continue
            place = int(generator.integers(self._buffer))
            yield buffer[place]
            buffer[place] = record
        yield from (buffer[index] for index in generator.permutation(len(buffer)))

    def _read(self, shards: Iterable[Path]) -> Iterator[RawRecord]:
        for shard in shards:
            yield from usable(self._reader.read(shard), self._checked, self.on_bad_record, self.skipped)

    def _checked(self, record: RawRecord) -> RawRecord:
        """The record; what is to be skipped has to show before it takes a place in the order."""
        if self.on_bad_record == "skip":
            self._example(record)
        return record

    def _example(self, record: RawRecord) -> Example:
        settled, where = settle(record, self.source, self._base, self._left_out), record["where"]
        if self.maker is None:
            return parse_record(settled, where)
        document = parse_document(settled, where)
        self.maker.check(document)
        return document


Source = RecordDataset | RecordStream
