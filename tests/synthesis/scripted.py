"""A generator whose answers a test writes, in threads and in any order, as servers give them."""

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

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
