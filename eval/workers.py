"""Processes that evaluate the same as this one, on other devices, and divide the encoding with it.

Each loads the models, goes through the tasks in the same order and encodes its share of the contents into the folder
of `--cache` (`eval.embedding_cache`), from which all take the rest. This process alone scores what is reported. One
that dies costs its speed and no result: its share is encoded here. All end with this process (`mmembed.guard`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from eval.files import REPOSITORY
from mmembed import guard

logger = logging.getLogger(__name__)


def threads_of(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def share_threads(devices: Sequence[str]) -> None:
    """Gives this process its share of the cores, where it computes on them."""
    if devices[0].startswith("cpu"):
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), threads_of(len(devices))))


class Workers:
    """The other processes.

    Args:
        arguments: of this process's `eval.run`.
        devices: of all processes, this one first.
        cache: folder of the vectors, and of what each of the others prints, `worker-1.log` and so on.
    """

    def __init__(self, arguments: Sequence[str], devices: Sequence[str], cache: Path) -> None:
        self.arguments, self.devices, self.cache = arguments, devices, cache
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        self._told: set[Path] = set()

    def __enter__(self) -> Self:
        self.cache.mkdir(parents=True, exist_ok=True)
        parts = len(self.devices)
        environment = {"OMP_NUM_THREADS": str(threads_of(parts))} | os.environ
        with ExitStack() as logs:
            for part, device in enumerate(self.devices[1:], start=1):
                own = ["--share", f"{part}/{parts}", "--device", device, "--cache", str(self.cache)]
                command = [sys.executable, "-I", guard.__file__, str(os.getpid()), sys.executable, "-m", "eval.run"]
                path = self.cache / f"worker-{part}.log"
                log: IO[Any] = logs.enter_context(path.open("wb"))
                self._running[path] = subprocess.Popen(
                    [*command, *self.arguments, *own], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
                )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()

    def alone(self) -> bool:
        """Whether all others have ended; says once of each that has failed where its words are."""
        for log, process in self._running.items():
            if process.poll() not in (None, 0) and log not in self._told:
                self._told.add(log)
                logger.warning("%s: a process ended with status %s; going on without it", log, process.returncode)
        return all(process.poll() is not None for process in self._running.values())
