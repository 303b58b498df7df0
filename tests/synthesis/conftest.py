"""A generator whose answers a test writes, in threads and in any order, as servers give them."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from data_tools import generators
from data_tools.generators import Answer, Generator, Request

Script = Callable[[Request], Answer | str]


class Scripted(Generator):
    """Registered for the time of a test as `scripted`."""

    name = "scripted"
    reads = frozenset({"text", "image"})
    script: Script
    asked: list[Request]
    started = 0

    def __init__(self, model: str = "a") -> None:
        self.model = model

    @property
    def capacity(self) -> int:
        return 8

    def fingerprint(self):
        return [self.name, self.model]

    def start(self, media) -> None:
        type(self).started += 1
        self.media = media
        self.pool = ThreadPoolExecutor(8)

    def submit(self, request: Request) -> Future[Answer]:
        type(self).asked.append(request)
        return self.pool.submit(self._answer, request)

    def _answer(self, request: Request) -> Answer:
        time.sleep(random.random() * 0.002)  # answers come in any order
        given = type(self).script(request)
        return given if isinstance(given, Answer) else Answer(given, "stop", 10, len(given.split()))

    def close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch):
    """The class of a generator `scripted`; set its `script`."""
    kind = type("Scripted", (Scripted,), {"name": "scripted", "asked": [], "started": 0})
    classes = {**generators.GENERATORS.classes(), "scripted": kind}
    monkeypatch.setattr(generators.GENERATORS, "_classes", classes)
    return kind


@pytest.fixture
def write_lines(tmp_path):
    def write(name: str, rows) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
