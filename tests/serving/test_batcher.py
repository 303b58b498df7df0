"""The batcher by itself: what goes together, who waits for whom, and what happens when something fails."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import MmembedError
from mmembed.preprocess import Row
from mmembed.serving.batcher import BROKEN, Batcher, QueueFull
from mmembed.serving.metrics import Metrics


class Numbers:
    """A model whose result of a row is its first token; it computes when the gate is open, and dies of token 666."""

    def __init__(self, name="numbers", together=False, budget=10, error=MmembedError):
        self.name, self.together, self.batch_tokens, self.error = name, together, budget, error
        self.gate, self.batches = threading.Event(), []
        self.gate.set()

    def run(self, rows):
        self.gate.wait(10)
        self.batches.append([row.ids[0] for row in rows])
        if any(row.ids[0] == 666 for row in rows):
            raise self.error("contents[0]: the number of the beast")
        return np.array([row.ids[0] for row in rows], np.float32)


def rows(*numbers, length=1):
    return [Row([number] * length) for number in numbers]


@pytest.fixture
def batcher():
    batcher = Batcher(100, Metrics(), wait=0.0)
    batcher.start()
    yield batcher
    batcher.close()
    assert batcher._inputs == batcher._tokens == 0 and not batcher._jobs


def held(batcher, model):
    """Has the model begin a batch that does not end, so that what comes now waits."""
    model.gate.clear()
    job = batcher.submit(model, rows(0))
    until = time.monotonic() + 10
    while batcher._inputs and time.monotonic() < until:
        time.sleep(0.001)
    return job


def test_what_waits_goes_together_up_to_the_budget(batcher):
    model = Numbers(budget=10)
    held(batcher, model)
    jobs = [batcher.submit(model, rows(number, length=4)) for number in (1, 2, 3)]
    model.gate.set()
    assert [job.future.result(10).tolist() for job in jobs] == [[1], [2], [3]]
    assert model.batches == [[0], [1, 2], [3]]


def test_a_small_request_waits_for_a_batch_and_not_for_a_large_request(batcher):
    model = Numbers(budget=3)
    held(batcher, model)
    large, small = batcher.submit(model, rows(*range(1, 10))), batcher.submit(model, rows(50))
    model.gate.set()
    assert small.future.result(10).tolist() == [50] and large.future.result(10).tolist() == list(range(1, 10))
    assert model.batches == [[0], [1, 2, 3], [50, 4, 5], [6, 7, 8], [9]]


def test_a_row_above_the_budget_is_a_batch_of_its_own(batcher):
    model = Numbers(budget=3)
    held(batcher, model)
    job = batcher.submit(model, [*rows(1), *rows(2, length=9), *rows(3)])
    model.gate.set()
    assert job.future.result(10).tolist() == [1, 2, 3] and model.batches == [[0], [1], [2], [3]]


def test_rows_that_belong_together_stay_together_and_alone(batcher):
    model = Numbers(together=True, budget=3)
    held(batcher, model)
    jobs = [batcher.submit(model, rows(1, 2, 3, 4, 5)), batcher.submit(model, rows(6))]
    model.gate.set()
    assert [job.future.result(10).tolist() for job in jobs] == [[1, 2, 3, 4, 5], [6]]
    assert model.batches == [[0], [1, 2, 3, 4, 5], [6]]


def test_models_take_turns(batcher):
    one, two = Numbers("one"), Numbers("two")
    held(batcher, one)
    jobs = [batcher.submit(model, rows(number)) for number, model in enumerate([one, two, one, two], start=1)]
    one.gate.set()
    assert [job.future.result(10).tolist() for job in jobs] == [[1], [2], [3], [4]]
    assert one.batches == [[0], [1, 3]] and two.batches == [[2, 4]]


def test_a_lone_request_waits_for_others():
    batcher, model = Batcher(100, Metrics(), wait=0.5), Numbers(budget=4)
    batcher.start()
    try:
        begin = time.monotonic()
        jobs = [batcher.submit(model, rows(number)) for number in (1, 2)]
        assert [job.future.result(10).tolist() for job in jobs] == [[1], [2]]
        assert model.batches == [[1, 2]] and time.monotonic() - begin >= 0.5
        begin = time.monotonic()
        full = batcher.submit(model, rows(3, 4, 5, 6))
        assert full.future.result(10).tolist() == [3, 4, 5, 6] and time.monotonic() - begin < 0.4
    finally:
        batcher.close()


def test_what_nobody_waits_for_is_not_computed(batcher):
    model = Numbers(budget=2)
    held(batcher, model)
    left, kept = batcher.submit(model, rows(1, 2, 3)), batcher.submit(model, rows(4))
    assert batcher._inputs == 4
    assert left.future.cancel() and batcher._inputs == 1
    model.gate.set()
    assert kept.future.result(10).tolist() == [4] and model.batches == [[0], [4]]
    with pytest.raises(CancelledError):
        left.future.result(0)


def test_one_that_leaves_in_the_middle(batcher):
    model = Numbers(budget=2)
    held(batcher, model)
    job = batcher.submit(model, rows(1, 2, 3, 4, 5))
    model.run, run = lambda rows: (job.future.cancel(), run(rows))[1], model.run
    model.gate.set()
    assert batcher.submit(model, rows(6)).future.result(10).tolist() == [6]
    assert [3, 4] not in model.batches


def test_a_failure_is_that_of_its_request_alone(batcher):
    model = Numbers()
    held(batcher, model)
    jobs = [batcher.submit(model, rows(*numbers)) for numbers in ([1], [2, 666], [3])]
    model.gate.set()
    assert jobs[0].future.result(10).tolist() == [1] and jobs[2].future.result(10).tolist() == [3]
    with pytest.raises(MmembedError, match="beast"):
        jobs[1].future.result(10)
    assert batcher.healthy


def test_the_part_that_failed_is_known(batcher):
    model = Numbers(budget=2)
    job = batcher.submit(model, rows(1, 2, 3, 666, 5, 6))
    with pytest.raises(MmembedError):
        job.future.result(10)
    assert job.failed == 2 and batcher.submit(model, rows(7)).future.result(10).tolist() == [7]
    assert [5, 6] not in model.batches


def test_a_model_that_keeps_failing_makes_the_server_unhealthy(batcher):
    model = Numbers(error=RuntimeError)
    for _ in range(BROKEN):
        assert batcher.healthy
        with pytest.raises(RuntimeError):
            batcher.submit(model, rows(666)).future.result(10)
    assert not batcher.healthy
    assert batcher.submit(model, rows(1)).future.result(10).tolist() == [1] and batcher.healthy


def test_more_than_may_wait(batcher):
    model = Numbers()
    held(batcher, model)
    jobs = [batcher.submit(model, rows(*range(50))) for _ in range(2)]
    with pytest.raises(QueueFull, match="100 inputs wait") as full:
        batcher.submit(model, rows(1))
    assert 1 <= full.value.seconds <= 60
    jobs[0].future.cancel()
    last = batcher.submit(model, rows(*range(50)))
    model.gate.set()
    assert last.future.result(10).tolist() == list(range(50))


def test_closing_finishes_what_waits():
    batcher, model = Batcher(100, Metrics(), wait=5.0), Numbers(budget=1000)
    batcher.start()
    job = batcher.submit(model, rows(1, 2))
    batcher.close()
    assert job.future.result(0).tolist() == [1, 2] and not batcher.healthy


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=8), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_every_row_is_computed_once_within_the_budget(lengths, budget):
    batcher, model = Batcher(10_000, Metrics(), wait=0.0), Numbers(budget=budget)
    batcher.start()
    held(batcher, model)
    number, jobs, tokens = 1, [], {0: 1}
    for some in lengths:
        given = [Row([number + at] * length) for at, length in enumerate(some)]
        tokens |= {row.ids[0]: len(row) for row in given}
        number += len(given)
        jobs.append((batcher.submit(model, given), [row.ids[0] for row in given]))
    model.gate.set()
    for job, expected in jobs:
        assert job.future.result(10).tolist() == expected
    batcher.close()
    assert sorted(one for batch in model.batches for one in batch) == list(range(number))
    assert all(len(batch) == 1 or sum(tokens[one] for one in batch) <= budget for batch in model.batches)
