"""A run that two processes began goes on in one, and the other way round; a signal to one process stops both."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from recipes.train_embedder import main
from tests.recipes.conftest import backbone, config_file, data, stop_in_step  # noqa: F401  (fixtures)
from tests.runs import ROOT, in_two_processes, losses, two_processes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = 10
EXACT = ["adapter.dropout=0.0", "data.dev=[]", f"training.max_steps={STEPS}", "training.save_strategy=steps"]
EXACT += ["data.train=[{path: text.jsonl, streaming: true, shuffle_buffer: 7, weight: 2}, {path: pictures.jsonl}]"]
EXACT += ["training.learning_rate=1e-3", "training.logging_steps=2"]


def arguments(config_file, folder, rows, *more):  # noqa: F811
    overrides = [*EXACT, f"training.per_device_train_batch_size={rows}", f"training.output_dir={folder}", *more]
    return ["--config", str(config_file), *overrides]


@pytest.fixture
def whole(config_file, tmp_path):  # noqa: F811
    """The losses of one process, uninterrupted."""
    assert main(arguments(config_file, tmp_path / "whole", 8)) == 0
    return losses(tmp_path / "whole")


def worker(launcher, rank):
    """Number of the process of a rank below a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def test_two_processes_stop_together_and_one_goes_on(config_file, tmp_path, capsys, whole):  # noqa: F811
    out = tmp_path / "out"
    started = subprocess.Popen(
        two_processes("recipes.train_embedder", *arguments(config_file, out, 4, "training.save_steps=1")),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "checkpoint-1" / "trainer_state.json").exists():
        assert started.poll() is None, started.stderr.read()[-3000:]
        time.sleep(0.02)
    os.kill(worker(started.pid, 1), signal.SIGTERM)
    errors = started.communicate(timeout=120)[1]
    assert started.returncode == 1  # torchrun's own, for whatever a process ended with
    assert "stopped by SIGTERM after step" in errors and "stopped by another process after step" in errors
    assert "exitcode  : 75" in errors
    last = max(int(path.name.rsplit("-")[1]) for path in out.glob("checkpoint-*"))
    assert 1 <= last < STEPS
    folder = out / f"checkpoint-{last}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= set(os.listdir(folder))
    capsys.readouterr()
    assert main(arguments(config_file, out, 4)) == 2
    assert "8 rows (2 processes x 4)" in capsys.readouterr().err
    assert main(arguments(config_file, out, 8)) == 0
    assert losses(out) == pytest.approx(whole, rel=1e-4)


def test_one_process_stops_and_two_go_on(config_file, tmp_path, stop_in_step, whole):  # noqa: F811
    out = tmp_path / "out"
    stop_in_step(3)
    assert main(arguments(config_file, out, 8)) == 75
    done = in_two_processes("recipes.train_embedder", *arguments(config_file, out, 4))
    assert "was written by 1 processes, now there are 2" in done.stderr
    assert losses(out) == pytest.approx(whole, rel=1e-4)
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
