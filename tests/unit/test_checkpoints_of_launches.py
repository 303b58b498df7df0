"""A checkpoint goes on under the launch that wrote it: what else can read it, and what is refused with the reason."""

import itertools
import json
from types import SimpleNamespace

import pytest

from mmembed.config import build_config
from mmembed.errors import CheckpointError
from mmembed.training.arguments import training_arguments
from mmembed.training.checkpoints import checkpoint_to_resume, describe_run

STATES = {
    "whole": "one process or DDP",
    "deepspeed-1": "DeepSpeed ZeRO-1",
    "deepspeed-2": "DeepSpeed ZeRO-2",
    "deepspeed-3": "DeepSpeed ZeRO-3",
    "fsdp-FULL_STATE_DICT": r"FSDP2 \(FULL_STATE_DICT\)",
    "fsdp-SHARDED_STATE_DICT": r"FSDP2 \(SHARDED_STATE_DICT\)",
}


def launched(state, processes, rows=12):
    """Arguments of a launch, as far as a checkpoint looks at them."""
    form, _, kind = state.partition("-")
    return SimpleNamespace(
        world_size=processes,
        per_device_train_batch_size=rows // processes,
        process_index=0,
        deepspeed=form == "deepspeed",
        deepspeed_plugin=SimpleNamespace(zero_stage=int(kind)) if form == "deepspeed" else None,
        fsdp=form == "fsdp",
        fsdp_config={"state_dict_type": kind},
    )


@pytest.fixture
def going_on(tmp_path):
    """going_on(launch that wrote the checkpoint, launch now) -> whether it was found; CheckpointError."""
    config = build_config({"training": {"output_dir": str(tmp_path)}})
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rng_state_0.pth").write_bytes(b"")

    def resume(before, now):
        (folder / "training_run.json").write_text(json.dumps(describe_run(config, before)))
        return checkpoint_to_resume(config, now) == str(folder)

    return resume


@pytest.mark.parametrize(("before", "now"), itertools.permutations(STATES, 2))
def test_another_strategy_is_refused(going_on, before, now):
    with pytest.raises(
        CheckpointError,
        match=f"checkpoint-2: the optimizer's state was written by {STATES[before]}, now there is {STATES[now]}, which",
    ):
        going_on(launched(before, 2), launched(now, 2))


@pytest.mark.parametrize("state", STATES)
def test_the_same_launch_goes_on(going_on, state):
    assert going_on(launched(state, 2), launched(state, 2))


@pytest.mark.parametrize("state", [state for state in STATES if state.startswith("deepspeed")])
def test_deepspeed_with_other_processes_is_refused(going_on, state):
    with pytest.raises(CheckpointError, match=r"into parts for 2 processes, now there are 3; resume with 2$"):
        going_on(launched(state, 2), launched(state, 3))


@pytest.mark.parametrize("state", [state for state in STATES if not state.startswith("deepspeed")])
def test_others_go_on_with_other_processes(going_on, state):
    assert going_on(launched(state, 2), launched(state, 3))


def test_another_batch_is_refused_whoever_wrote_it(going_on):
    with pytest.raises(CheckpointError, match=r"12 rows \(2 processes x 6\), now it would have 8 \(2 x 4\).*size to 6"):
        going_on(launched("whole", 2), launched("whole", 2, rows=8))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_that_of_the_deepspeed_file(tmp_path, stage):
    """Of real arguments: stages write what another one cannot read."""
    given = {"output_dir": str(tmp_path), "deepspeed": f"recipes/deepspeed/zero{stage}.json"}
    config = build_config({"training": given})
    assert describe_run(config, training_arguments(config))["state"] == f"deepspeed-{stage}"
