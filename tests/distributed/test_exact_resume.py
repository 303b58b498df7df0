"""Several processes with dropout, stopped and gone on with: bit for bit the uninterrupted run. FSDP2 in another number.

What one process does (tests/recipes/test_resume.py) says nothing of the random states that each process keeps.
"""

import os
import shutil
import subprocess

import pytest
import torch

from tests.distributed.test_strategies import MANY, PLAIN, weights
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import ROOT, in_two_processes, launch, losses, two_processes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SHARDED = ["training.fsdp=true", "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"]


def run_of(config_file, folder, rows, dropout):  # noqa: F811
    arguments = ["--config", str(config_file), *PLAIN, *MANY, f"adapter.dropout={dropout}", "data.dev=[]"]
    arguments += ["data.train=[{path: text.jsonl}]", "training.save_strategy=steps", "training.save_steps=2"]
    return [*arguments, f"training.per_device_train_batch_size={rows}", f"training.output_dir={folder}"]


def cut(folder):
    """As if the run had been killed after its second step."""
    shutil.rmtree(folder / "checkpoint-4")
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp2 sharded"])
def test_dropout_goes_on_where_each_process_was(config_file, tmp_path, strategy):  # noqa: F811
    out = tmp_path / "out"
    arguments = run_of(config_file, out, 4, 0.1)

    def start(*more):
        if strategy == "fsdp2 sharded":
            return in_two_processes("recipes.train_embedder", *arguments, *SHARDED, *more)
        return launch(strategy, *arguments, *more)

    start()
    logged, expected = losses(out), weights(out)
    kept = [torch.load(out / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*kept), "either process could go on with the state of the other"
    cut(out)
    start("training.resume_from_checkpoint=true")
    assert losses(out) == logged and len(logged) == 4
    for name, tensor in weights(out).items():
        assert torch.equal(expected[name], tensor), name


@pytest.mark.parametrize(
    ("rank", "part", "strategy"),
    [
        (1, "checkpoint-4/global_step4/zero_pp_rank_1", ["training.deepspeed=recipes/deepspeed/zero1.json"]),
        (0, "checkpoint-4/optimizer.bin", ["training.fsdp=true"]),
    ],
    ids=["zero1", "fsdp2"],
)
def test_killed_while_its_part_of_the_optimizer_is_written(config_file, tmp_path, rank, part, strategy):  # noqa: F811
    """The half checkpoint does not count, and is replaced by the same command."""

    def start(folder):
        return [*run_of(config_file, tmp_path / folder, 4, 0.1), "training.max_steps=5", *strategy]

    in_two_processes("recipes.train_embedder", *start("whole"))
    died = subprocess.run(
        two_processes("tests.distributed.dying", str(rank), part, *start("killed")),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert died.returncode == 1 and "Signal 9 (SIGKILL)" in died.stderr, died.stderr[-3000:]
    (half,) = (tmp_path / "killed").glob(f"{part}*")
    assert half.stat().st_size > 0 and not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists()
    done = in_two_processes("recipes.train_embedder", *start("killed"))
    assert f"going on from {tmp_path / 'killed' / 'checkpoint-2'}" in done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "killed").items():
        assert torch.equal(expected[name], tensor), name


def test_fsdp2_goes_on_with_another_number_of_processes(config_file, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    launch("fsdp2", *run_of(config_file, out, 6, 0.0))
    logged, expected = losses(out), weights(out)
    cut(out)
    done = launch("fsdp2", *run_of(config_file, out, 4, 0.0), "training.resume_from_checkpoint=true", processes=3)
    assert "was written by 2 processes, now there are 3" in done.stderr
    assert losses(out) == pytest.approx(logged, rel=1e-5)
    for name, tensor in weights(out).items():
        torch.testing.assert_close(expected[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
