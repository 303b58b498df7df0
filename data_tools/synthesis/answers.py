"""Every answer of a run on the disk, under a digest of its request: none is asked for twice.

    answers.jsonl    {"key", "text", "finish", "prompt_tokens", "tokens"} a line

A line is written as soon as its answer is there. A killed process loses what was in flight; a line that it left
unfinished is cut off by the next one. The disk is waited for once a second, which only a power failure makes matter.

A worker of a cluster keeps its answers in a file of its own, over those that the run had before (`base`).

Cost: 200 bytes of memory an answer, for its place; texts stay in the file.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_tools.generators import Answer

_RECENT = 4096  # answers that are kept in memory: an item is looked at again when its next answer comes
_SYNC_SECONDS = 1.0
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Answers:
    """Answers by key; the file is this process's alone, unless it is only read.

    Args:
        base: another process's, which are looked up where the file has none; they do not count as its own.
        read_only: as far as the file is now.
    """

    def __init__(self, path: Path, base: Answers | None = None, read_only: bool = False) -> None:
        self.path, self._base = path, base
        self.prompt_tokens = self.tokens = 0  # of all answers
        self._places: dict[str, int] = {}
        self._recent: OrderedDict[str, Answer] = OrderedDict()
        self._end = self._read()
        self._file: Any = None
        if read_only:
            return
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(list(self._places))

    def __contains__(self, key: str) -> bool:
        return key in self._places or (self._base is not None and key in self._base)

    def get(self, key: str) -> Answer | None:
        """None where there is none yet."""
        if key in self._recent:
            return self._recent[key]
        place = self._places.get(key)
        if place is None:
            return None if self._base is None else self._base.get(key)
        with self.path.open("rb") as file:
            file.seek(place)
            entry = json.loads(file.readline())
        return self._remember(key, Answer(entry["text"], entry["finish"], entry["prompt_tokens"], entry["tokens"]))

    def add(self, key: str, answer: Answer) -> None:
        """Raises OSError where the disk is full; then the answer is as missing as before."""
        entry: dict[str, Any] = {"key": key, "text": answer.text, "finish": answer.finish}
        entry |= {"prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        line = _ENCODER.encode(entry).encode("utf-8", errors="replace") + b"\n"
        try:
            rest = memoryview(line)
            while rest:  # a nearly full disk takes a part
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.seek(self._end)
            raise
        self._count(key, self._end, answer.prompt_tokens, answer.tokens)
        self._end += len(line)
        self._remember(key, answer)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _read(self) -> int:
        """Finds the places of all whole lines; where they end."""
        end = 0
        if not self.path.exists() or not self.path.stat().st_size:
            return end
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for line in iter(whole.readline, b""):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    self._count(entry["key"], end, entry["prompt_tokens"], entry["tokens"])
                except (ValueError, KeyError, TypeError):  # zeros, where a machine lost its power
                    pass
                end += len(line)
        return end

    def _count(self, key: str, place: int, prompt_tokens: int, tokens: int) -> None:
        self._places[key] = place
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens

    def _remember(self, key: str, answer: Answer) -> Answer:
        self._recent[key] = answer
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return answer
