"""The Slurm script puts a job back into the queue when it is worth it: with a real shell, and stand-ins for Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "slurm" / "train.sbatch"
COMMANDS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2"; else echo node-a; fi',
    "srun": """
status=0
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@"
    code=$?
    [ "$code" -gt "$status" ] && status=$code
done
exit "$status"
""",
    "python": 'codes=($CODES); code=${codes[$RANK]}; [ "$code" = 137 ] && kill -9 $$; exit "$code"',
}


@pytest.mark.parametrize(
    ("codes", "requeued"),
    [
        ((0, 0), False),
        ((75, 75), True),
        ((75, 137), True),  # a process was lost, the other one says so
        ((2, 75), False),  # a full disk on the first process: the others lost it
        ((75, 1), False),
        ((137, 137), False),
    ],
)
def test_a_job_is_requeued_where_the_same_command_goes_on(tmp_path, codes, requeued):
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(len(codes)), "SLURM_JOB_NODELIST": "node-a"}
    slurm |= {"SLURM_SUBMIT_DIR": str(tmp_path), "CODES": " ".join(map(str, codes))}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPT, "config.yaml"], env=environment, capture_output=True, text=True)
    assert ("requeued 7" in done.stdout) == requeued
    assert done.returncode == max(codes)
    assert not list(tmp_path.glob(".ended*"))
