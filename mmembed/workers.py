"""One function over many tasks: in this process, or in workers of a Ray cluster, with the same results.

    for task, result in spread(tasks, make, workers): ...

`make()` gives the function, which holds what is expensive (a model), so a worker calls it once. Tasks are numbers; what
a task is has to be found by its number, on a disk that all workers see, so that no data travel to them. In this process
results come in the order of the tasks, with Ray Data as they are ready. A worker that dies is started again by Ray, and
what it had not given is computed again: a function must depend on its task alone. Workers begin in the folder that this
process works in, so relative paths mean the same.

Cost: Ray starts in 10 s, once; a task costs milliseconds beside the function; results travel through the object store.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmembed.errors import ConfigError, MmembedError

R = TypeVar("R")
_LOCAL = "local"  # instead of an address: a cluster of this machine alone, which ends with this process


@dataclass(frozen=True)
class Workers:
    """Where tasks are carried out.

    Attributes:
        address: of a running Ray cluster (`auto`, `HOST:PORT`), or `local` for one of this machine alone.
        count: functions that work at a time, each in a process of its own.
        threads: of torch, and CPU cores that Ray reserves, of a worker. One thread as in Ray's own default; numbers of
            a CPU are those of a single process with as many threads.
        gpus: that Ray reserves for a worker, which sees no others; a part of one lets workers share it. None: one where
            the cluster has any.
    """

    address: str = _LOCAL
    count: int = 1
    threads: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name in ("count", "threads"):
            if vars(self)[name] < 1:
                raise ConfigError(f"ray: {name} {vars(self)[name]}; give at least 1")
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ConfigError(f"ray: gpus {self.gpus}; give 0 or more")


def spread(
    tasks: Sequence[int], make: Callable[[], Callable[[int], R]], workers: Workers | None = None
) -> Iterator[tuple[int, R]]:
    """Each task with what the function gives of it.

    Args:
        make: with Ray it is pickled and called in each worker; so are results. Without tasks it is not called.
        workers: None is this process.

    Raises:
        MmembedError: of the function, whichever process it was in; Ray is not installed or cannot be reached.
    """
    if not tasks:
        return
    if workers is None:
        function = make()
        for task in tasks:
            yield task, function(task)
        return
    ray = _connected(workers)
    yield from _by_ray(ray, tasks, make, workers, _reserved(ray, workers))


def check_ray() -> None:
    """Raises MmembedError where Ray is not installed."""
    _ray()


def _by_ray(
    ray: Any, tasks: Sequence[int], make: Callable[[], Callable[[int], R]], workers: Workers, gpus: float
) -> Iterator[tuple[int, R]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts what tasks are made of
    # A block is what Ray Data hands to a worker, and what is lost with it: one task each.
    dataset = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map_batches(
        _Worker,
        fn_constructor_args=(make, workers.threads, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(tasks))),
        batch_size=1,
        num_cpus=workers.threads,
        num_gpus=gpus,
    )
    given = set()
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        for task, pickled in zip(batch["task"].tolist(), batch["result"], strict=True):
            result = pickle.loads(pickled)  # of our own worker, not of a file
            if isinstance(result, MmembedError):
                raise result
            given.add(task)
            yield task, result
    missing = sorted(set(tasks) - given)
    if missing:
        raise MmembedError(f"ray: gave nothing for {len(missing)} of {len(tasks)} tasks; the same command goes on")


class _Worker:
    """What Ray Data keeps in each process."""

    def __init__(self, make: Callable[[], Callable[[int], Any]], threads: int, folder: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._function: Callable[[int], Any] | None = None
        self._failed: MmembedError | None = None
        try:
            os.chdir(folder)
            self._function = make()
        except OSError as error:
            self._failed = MmembedError(
                f"ray: worker on {os.uname().nodename}: {error}; start the command in a folder that all workers "
                "see, and keep what it reads on a disk that they share"
            )
        except MmembedError as error:  # raised here, Ray would start the worker again and again
            self._failed = MmembedError(str(error))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (task,) = batch["item"].tolist()
        result: Any = self._failed
        if self._function is not None:
            try:
                result = self._function(task)
            except MmembedError as error:
                result = MmembedError(str(error))
        return {"task": [task], "result": [pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)]}


def _connected(workers: Workers) -> Any:
    """Ray, connected until this process ends, since starting takes long; a program that is connected stays so.

    A local cluster has as many cores as its workers are promised, whatever the machine has.
    """
    ray = _ray()
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"address": workers.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if workers.address == _LOCAL:
        options |= {"num_cpus": workers.count * workers.threads, "include_dashboard": False}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises just that where a busy machine has not started it in 30 s
        ray.shutdown()
        raise MmembedError(
            f"ray: cannot be used at {workers.address} ({error}); check the address, or give '{_LOCAL}'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _reserved(ray: Any, workers: Workers) -> float:
    """GPUs of a worker. Raises MmembedError where the workers could never all start: Ray would wait for ever."""
    there = ray.cluster_resources()
    gpus = workers.gpus if workers.gpus is not None else float(there.get("GPU", 0) > 0)
    for name, each in (("CPU", workers.threads), ("GPU", gpus)):
        if workers.count * each > there.get(name, 0):
            raise MmembedError(
                f"ray: {workers.count} workers of {each:g} {name} each; the cluster at {workers.address} has "
                f"{there.get(name, 0):g}: give fewer workers, or less for each"
            )
    return gpus


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MmembedError(f"ray is not installed ({error}); pip install 'mmembed[ray]'") from error
    return ray
