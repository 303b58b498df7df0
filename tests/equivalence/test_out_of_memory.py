"""A step that really runs out of memory is redone in smaller chunks, and gives what the undivided step gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmembed.errors import MmembedError
from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step
from mmembed.training.out_of_memory import Budget, Halving, is_out_of_memory
from mmembed.training.teacher import teacher_of
from tests.equivalence.toy import ToyEncoder, gradients, make_batch, relative, teaching
from tests.runs import ROOT, in_two_processes

LEARNED = {"type": "contrastive", "temperature": {"value": 0.1, "learn": True}}


def asks_for_too_much():
    torch.empty(2**60, dtype=torch.uint8)


class Small(ToyEncoder):
    """A toy encoder on a device that holds `most` padded tokens: what is more is really refused by the allocator."""

    def __init__(self, most, only_with_gradients=False, **options):
        super().__init__(**options)
        self.most, self.only_with_gradients, self.failures = most, only_with_gradients, 0

    def forward(self, chunk):
        if chunk.padded_tokens > self.most and (torch.is_grad_enabled() or not self.only_with_gradients):
            self.failures += 1
            asks_for_too_much()
        return super().forward(chunk)


def redone(encoder, objective, batches, budget, teacher=None):
    """What the trainer does: the batches of one optimizer step, their gradients added up."""
    teacher = teaching(encoder, objective, teacher)
    halving = Halving(budget, torch.device("cpu"), redo=True, remedy="REMEDY")

    def step(batch):
        scale, keep = 1 / len(batches), halving.budget.keep_tokens
        return contrastive_step(encoder, objective, batch, keep, scale, guard=halving.guard, teacher=teacher)

    def forget():
        encoder.zero_grad(), objective.zero_grad()

    found = [halving.run(batch, step, forget, last=batch is batches[-1])[0][0] for batch in batches]
    return found, halving


def test_real_errors_are_told_from_others():
    with pytest.raises(RuntimeError) as found:
        asks_for_too_much()
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("only_with_gradients", [False, True], ids=["in the first pass", "in the second pass"])
@pytest.mark.parametrize("keep_tokens", [None, 300, 0])
def test_the_gradient_is_that_of_the_undivided_step(keep_tokens, only_with_gradients):
    """Over two accumulated batches: the second one fails when the first one's gradient is there already."""
    batches = [make_batch(6, 3, 10**6, seed=seed) for seed in (3, 4)]
    encoder, objective = ToyEncoder(), build_objective(LEARNED)
    expected = [contrastive_step(encoder, objective, batch, None, scale=0.5)[0] for batch in batches]
    small, its_objective = Small(40, only_with_gradients), build_objective(LEARNED)
    found, halving = redone(small, its_objective, batches, Budget(10**6, None, keep_tokens))
    assert small.failures > 0 and halving.budget.chunk_tokens <= 40
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)
    assert relative(gradients(small, its_objective), gradients(encoder, objective)) < 1e-5


def test_dropout_starts_from_the_same_random_state():
    """What is redone draws what a run with the smaller budget from the start would have drawn."""
    batch, small, encoder = make_batch(6, 3, 10**6), Small(40, dropout=0.5), ToyEncoder(dropout=0.5)
    its_objective, objective = build_objective(LEARNED), build_objective(LEARNED)
    torch.manual_seed(5)
    _, halving = redone(small, its_objective, [batch], Budget(10**6, None, 0))
    torch.manual_seed(5)
    contrastive_step(encoder, objective, halving.budget.divide(batch), 0)
    assert torch.equal(gradients(small, its_objective), gradients(encoder, objective))


def test_the_teacher_runs_out_of_memory_and_is_the_same_afterwards():
    """It goes first; student and teacher have other weights, and each has its own when the step is taken again."""
    found = []
    for encoder in (ToyEncoder(), Small(40)):
        objective, batch = build_objective("hycd"), make_batch(6, 3, 10**6)
        teacher = teacher_of(encoder, objective)
        teacher.begin()
        with torch.no_grad():
            encoder.layer.weight.add_(torch.eye(len(encoder.layer.weight)))
        (loss,), _ = redone(encoder, objective, [batch], Budget(10**6, None, 0), teacher)
        found.append((loss.item(), gradients(encoder, objective)))
    assert encoder.failures > 0
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert relative(found[1][1], found[0][1]) < 1e-5


def test_what_can_not_be_divided_is_an_error_with_the_numbers():
    batch = make_batch(6, 3, 10**6)
    with pytest.raises(MmembedError, match=r"one input a chunk.*12 tokens with 0 pictures.*6 queries.*18 docu.*REMEDY"):
        redone(Small(5), build_objective(LEARNED), [batch], Budget(10**6, None, None))


def test_other_errors_are_left_alone():
    def fail(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        redone(fail, build_objective("contrastive"), [make_batch(6, 3, 10**6)], Budget(10**6, None, None))


def test_a_resumed_run_goes_on_with_the_smaller_budget():
    halving = Halving(Budget(100, 7, None), torch.device("cpu"), redo=True, remedy="")
    halving.resume([{"loss": 1.0}, Budget(50, 7, 60).logged(), Budget(25, 7, 30).logged(), {"loss": 0.9}])
    assert halving.budget == Budget(25, 7, 30)
    halving.resume([{"loss": 1.0}])
    assert halving.budget == halving.configured


def test_a_resumed_run_obeys_a_config_that_asks_for_less_than_its_log():
    halving = Halving(Budget(20, 7, 24), torch.device("cpu"), redo=True, remedy="")
    halving.resume([Budget(50, 7, 60).logged()])
    assert halving.budget == Budget(20, 7, 24)
    halving.resume([Budget(50, 7, 20).logged()])
    assert halving.budget == Budget(20, 7, 20)


# Real runs ------------------------------------------------------------------------------------------------------------


def config(folder: Path, **training) -> Path:
    options = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 16, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "grad_cache": False, "disable_tqdm": True, **training,
    }  # fmt: skip
    run = {
        "model": {"name_or_path": "mmembed-nano", "dtype": "float32"},
        "adapter": {"type": "none"},
        "lengths": {"query_max_length": 32, "document_max_length": 128},
        "data": {"root": "data", "train_group_size": 1, "train": [{"path": "squad-en", "format": "beir"}]},
        "training": options,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run))
    return path


def under_a_limit(path, megabytes, *overrides):
    command = [sys.executable, "-m", "tests.equivalence.out_of_memory", str(path), str(megabytes), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment |= {"PYTHONMALLOC": "malloc", "PYTHONPATH": str(ROOT)}  # so that Python gets what tensors freed
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def result(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"losses"')))


@pytest.mark.slow
def test_under_a_real_limit_the_run_is_the_same(tmp_path):
    """170 MB above what the process holds before step 1: gradients and AdamW take 96 of them, all graphs of 16 pairs
    more than the rest."""
    path = config(tmp_path)
    free, limited = under_a_limit(path, 0), under_a_limit(path, 170)
    expected, found = result(free), result(limited)
    assert expected["budgets"] == [] and found["budgets"]
    assert "DefaultCPUAllocator: can't allocate memory" in limited.stderr and "taken again" in limited.stderr
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["weights"] == pytest.approx(expected["weights"], abs=1e-4)


@pytest.mark.slow
def test_where_nothing_fits_the_error_says_what_to_change(tmp_path):
    done = under_a_limit(config(tmp_path), 4)
    assert done.returncode != 0
    assert "even with one input a chunk" in done.stderr and "document_max_length (128)" in done.stderr


@pytest.mark.distributed
def test_a_process_alone_out_of_memory_takes_the_other_along(tmp_path):
    """Both redo the step, from the first forward pass on; the run equals that of one process that never fails."""
    overrides = ["lengths.document_max_length=32", "training.token_budget=2048"]
    failing = in_two_processes(
        "tests.equivalence.out_of_memory",
        str(config(tmp_path, per_device_train_batch_size=4)),
        "tokens=100",
        *overrides,
    )
    free = under_a_limit(config(tmp_path, per_device_train_batch_size=8), 0, *overrides)
    expected, found = result(free), result(failing)
    assert expected["budgets"] == [] and found["budgets"][-1] <= 100
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["weights"] == pytest.approx(expected["weights"], abs=1e-3)
