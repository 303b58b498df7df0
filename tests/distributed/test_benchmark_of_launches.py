"""A benchmark while several processes train: one has the model scored, all get the numbers, however it is divided.

A minute a strategy, most of it imports of the command.
"""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing as spawning

from mmembed.benchmark_run import main_scores, run_benchmark
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import launch

pytestmark = pytest.mark.distributed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_numbers_are_those_of_the_saved_model(config_file, tmp_path, strategy):  # noqa: F811
    """All weights trained, so that all come out of the engine."""
    run = ["evaluation={tasks: [stsb-en], limit: 20, device: cpu}", "data.dev=[]", "adapter={type: none}"]
    run += ["training.eval_strategy=steps", "training.eval_steps=2", "training.max_steps=3"]
    run += ["training.early_stopping_patience=9", "training.per_device_train_batch_size=4"]
    launch(strategy, "--config", str(config_file), *run)
    out = tmp_path / "out"
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_stsb-en" in entry] == [2, 3]  # and at the end
    options = ["--tasks", "stsb-en", "--limit", "20", "--device", "cpu"]
    final = json.loads((out / "metrics.json").read_text())["final_stsb-en"]
    assert main_scores(run_benchmark(out, tmp_path / "again.json", options)) == {"stsb-en": final}
    assert {path.suffix for path in (out / "evaluations").iterdir()} == {".json", ".log"}  # no weights


def test_an_answer_may_take_longer_than_the_timeout_of_a_collective(tmp_path):
    """And its error reaches every process."""
    spawning.spawn(_ask, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [["of process 0", "failed in process 0"]] * 2


def _ask(rank: int, folder: str) -> None:
    import time

    import torch.distributed as dist

    from mmembed.errors import MmembedError
    from mmembed.training.data_vectors import agreed_later

    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=30), world_size=2, rank=rank)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)

    def slow() -> str:
        time.sleep(5)
        return f"of process {rank}"

    def fail() -> str:
        raise MmembedError(f"failed in process {rank}")

    answers = [agreed_later(slow)]
    with pytest.raises(MmembedError) as caught:
        agreed_later(fail)
    Path(folder, f"{rank}.json").write_text(json.dumps([*answers, str(caught.value)]))
    dist.destroy_process_group()
