"""When a process of a run is gone, the others say which one, and how to go on.

What torch reports is "Connection closed by peer" in the middle of some collective, in each process another one. So each
process that meets such an error leaves a word in the rendezvous store, takes its own connections down (or a third one
would go on waiting for it), and looks who else left a word in `PATIENCE` seconds: who did not is lost.

A connection that dies without a word (a host without power, a cable) is noticed after `training.ddp_timeout` seconds.
Costs one entry of the store a process; nothing while all is well.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from mmembed.errors import WorkerLost
from mmembed.objectives.gather import world

PATIENCE = 10.0  # seconds; torchrun kills what is left of a host's processes 30 after one of them ended
_SIGNS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def naming_lost_workers(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Use around whatever the processes of a run do together.

    Args:
        how_to_go_on: the end of the message, asked for when it is needed.

    Raises:
        WorkerLost: a collective failed because of another process, with its rank and host.
    """
    rank, size = world()
    if size == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()  # torch has no public way to the store of a launched run
    store.set(_key("host", rank), f"{socket.gethostname()}, process {os.getpid()}")
    try:
        yield
    except Exception as error:
        if not is_of_connection(error):
            raise
        line = str(error).strip().splitlines()[0]
        raise WorkerLost(f"{_who_is_gone(store, rank, size)} ({line}). {how_to_go_on()}") from error


def is_of_connection(error: BaseException) -> bool:
    """Whether an error is of a collective whose other side is gone."""
    of_torch = isinstance(error, dist.DistError) and not isinstance(error, dist.DistStoreError)
    return of_torch or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))


def _who_is_gone(store: Any, rank: int, size: int) -> str:
    try:
        store.set(_key("alive", rank), "")
        with suppress(Exception):  # its other side may be gone, and that is what this is about
            dist.destroy_process_group()
        missing, until = _silent(store, size), time.monotonic() + PATIENCE
        while missing and time.monotonic() < until:
            time.sleep(0.1)
            missing = _silent(store, size)
        hosts = [store.get(_key("host", one)).decode() for one in missing]
    except (RuntimeError, dist.DistError):
        return "process 0 or its host, which holds the rendezvous, is gone"
    if not missing:
        return "the connection between the processes broke, all of them are there"
    names = [f"{one} (host {host})" for one, host in zip(missing, hosts, strict=True)]
    return f"process {', '.join(names)} is gone" if len(names) == 1 else f"processes {', '.join(names)} are gone"


def _silent(store: Any, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([_key("alive", rank)])]


def _key(what: str, rank: int) -> str:
    return f"mmembed/{what}/{rank}"
