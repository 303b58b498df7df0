"""Rows of many requests as batches of a model, in one thread.

While the model computes, requests gather; the next batch takes what waits, up to a budget of tokens. Where nothing
waits, the first request is held back for `wait` seconds, in which others that came with it arrive. A request that is
larger than a batch gives a part of its rows to each and stands behind the others in between, so that a small one waits
for a batch and not for another's request. What nobody waits for any more, because its client is gone or its time is
over, leaves the queue at once.

A batch that fails is computed again request by request, so that a damaged picture fails its own request alone. Costs
0.1 ms a batch.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmembed.errors import MmembedError
from mmembed.preprocess import Row
from mmembed.serving.metrics import Metrics
from mmembed.serving.models import Served
from mmembed.training.heap import give_back

WAIT = 0.003  # seconds; of a batch of the nano on two cores about a tenth
RETURNS = 10.0  # seconds between two returns of freed memory to the system (mmembed.training.heap): 1 to 30 ms
BROKEN = 3  # batches one behind another that failed by no fault of a request: the process should be replaced
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """So many inputs wait that this request would not be next for a while.

    Args:
        seconds: until about half of them are done.
    """

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} inputs wait for the model already; try again in {seconds} s")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A request's rows, and what becomes of them.

    Attributes:
        future: of the results (N, ...), a row each. Cancelling it takes what is left out of the queue.
        begun: rows that are in a batch or behind it.
        values: results so far.
        failed: the first row of the part that failed, which an error's index counts from.
    """

    model: Served
    rows: list[Row]
    arrived: float
    future: Future[NDArray[np.float32]] = field(default_factory=Future)
    begun: int = 0
    ended: int = 0
    values: NDArray[np.float32] | None = None
    failed: int = 0


@dataclass(frozen=True)
class _Share:
    """What a job gives to a batch."""

    job: Job
    start: int
    rows: list[Row]


class Batcher:
    """The queue in front of one or more models, and the thread that empties it.

    Args:
        waiting_inputs: more are refused.
        wait: seconds that the first of a batch is held back where the model has nothing to do.
        budget: tokens of a batch; None: the model's own number.
    """

    def __init__(self, waiting_inputs: int, metrics: Metrics, wait: float = WAIT, budget: int | None = None) -> None:
        self.waiting_inputs, self.wait, self.budget = waiting_inputs, wait, budget
        self._metrics = metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._inputs = self._tokens = 0  # of the rows that wait
        self._rate = 0.0  # tokens a second, of late
        self._failures = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="mmembed-batcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends when everything that waits is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._failures < BROKEN

    def check_room(self, inputs: int = 1) -> None:
        """Raises QueueFull where so many inputs would not be taken now."""
        if self._inputs + inputs > self.waiting_inputs:
            seconds = self._tokens / 2 / self._rate if self._rate else 1.0
            raise QueueFull(self._inputs, min(60, max(1, math.ceil(seconds))))

    def submit(self, model: Served, rows: list[Row]) -> Job:
        """Queues rows, at least one. Raises QueueFull."""
        job = Job(model, rows, time.monotonic())
        with self._changed:
            self.check_room(len(rows))
            self._jobs.append(job)
            self._count(len(rows), sum(map(len, rows)))
            self._changed.notify()
        job.future.add_done_callback(partial(self._forget, weakref.ref(job)))
        return job

    def _count(self, inputs: int, tokens: int) -> None:
        self._inputs += inputs
        self._tokens += tokens
        self._metrics.waiting(self._inputs, self._tokens)

    def _forget(self, known: weakref.ref[Job], _: Any) -> None:
        """Takes what is left of a job out of the queue. By a weak reference, since its future keeps this callback."""
        job = known()
        if job is None:
            return
        with self._changed:
            left = job.rows[job.begun :]
            job.begun = len(job.rows)
            if left:
                self._jobs.remove(job)
                self._count(-len(left), -sum(map(len, left)))

    def _work(self) -> None:
        returned = time.monotonic()
        while (shares := self._next()) is not None:
            self._compute(shares)
            del shares  # or the last rows would stay until the next come
            if time.monotonic() - returned > RETURNS:
                give_back()
                returned = time.monotonic()

    def _next(self) -> list[_Share] | None:
        """The next batch, as soon as it is worth computing; None when the batcher is closed and all is done."""
        with self._changed:
            while True:
                if not self._jobs:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                first = self._jobs[0]
                left = first.arrived + self.wait - time.monotonic()
                if left <= 0 or self._closing or self._tokens >= self._budget_of(first.model):
                    return self._take(first.model)
                self._changed.wait(left)

    def _budget_of(self, model: Served) -> int:
        return self.budget or model.batch_tokens

    def _take(self, model: Served) -> list[_Share]:
        """Rows of the jobs of this model, in their order, up to the budget, the first whatever it takes."""
        budget, taken, shares = self._budget_of(model), 0, list[_Share]()
        for job in [job for job in self._jobs if job.model is model]:
            stop = job.begun
            while stop < len(job.rows):
                tokens = len(job.rows[stop])
                if taken and taken + tokens > budget and not model.together:
                    break
                stop, taken = stop + 1, taken + tokens
            if stop > job.begun:
                shares.append(_Share(job, job.begun, job.rows[job.begun : stop]))
                job.begun = stop
                self._jobs.remove(job)
            if stop < len(job.rows):
                if shares and shares[-1].job is job:
                    self._jobs.append(job)
                break
            if model.together:
                break
        self._count(-sum(len(share.rows) for share in shares), -taken)
        return shares

    def _compute(self, shares: list[_Share]) -> None:
        """Runs a batch, and gives each job its part."""
        model, rows = shares[0].job.model, [row for share in shares for row in share.rows]
        tokens, begin = sum(map(len, rows)), time.monotonic()
        try:
            values = model.run(rows)
        except Exception as error:
            if len(shares) > 1:
                for share in shares:
                    self._compute([share])
                return
            if isinstance(error, MmembedError):
                self._failures = 0
            else:
                self._failures += 1
                _log.exception("a batch of %d inputs and %d tokens failed", len(rows), tokens)
            shares[0].job.failed = shares[0].start
            _settle(shares[0].job, error.with_traceback(None))  # whose frames hold the rows
            return
        self._failures = 0
        seconds = time.monotonic() - begin
        self._rate = 0.8 * self._rate + 0.2 * tokens / seconds if self._rate else tokens / seconds
        self._metrics.batch(model.name, len(shares), len(rows), tokens, seconds)
        at = 0
        for share in shares:
            _put(share, values[at : at + len(share.rows)])
            at += len(share.rows)


def _put(share: _Share, values: NDArray[np.float32]) -> None:
    job = share.job
    if job.values is None:
        job.values = np.empty((len(job.rows), *values.shape[1:]), values.dtype)
    job.values[share.start : share.start + len(values)] = values
    job.ended += len(values)
    if job.ended == len(job.rows):
        _settle(job, job.values)


def _settle(job: Job, outcome: Any) -> None:
    """Tells the one who waits, if anyone does."""
    if not job.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)
