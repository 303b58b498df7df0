"""Two hosts in network namespaces of their own on this machine: a process is lost, the run ends and goes on.

Needs root and iproute2. Nothing leaves the two namespaces, which see each other and nothing else.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.train_embedder import main
from tests.distributed.test_resume_elsewhere import EXACT, arguments, worker
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import ROOT, losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = "29517"


class Host:
    """A network namespace with an address, and a host name of its own for what is started in it."""

    def __init__(self, number):
        self.number, self.name = number, f"mmembed{os.getpid()}{'ab'[number]}"

    def start(self, *command, **environment):
        """A process of this host; its errors are to be read."""
        line = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']
        usual = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        usual |= {"GLOO_SOCKET_IFNAME": "wire", "TP_SOCKET_IFNAME": "wire"}
        return subprocess.Popen(
            [*line, f"node-{'ab'[self.number]}", sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **usual, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def hosts():
    """Two hosts that are wired to each other."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    both = Host(0), Host(1)
    try:
        for host in both:
            made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        wire = ["ip", "link", "add", "wire", "netns", both[0].name, "type", "veth"]
        wire += ["peer", "name", "wire", "netns", both[1].name]
        laid = subprocess.run(wire, capture_output=True, text=True)
        if laid.returncode != 0:
            pytest.skip(f"no pair of network devices can be made here: {laid.stderr.strip()}")
        for host, address in zip(both, ADDRESSES, strict=True):
            for rest in (["addr", "add", f"{address}/24", "dev", "wire"], ["link", "set", "wire", "up"]):
                subprocess.run(["ip", "-n", host.name, *rest], check=True)
            subprocess.run(["ip", "-n", host.name, "link", "set", "lo", "up"], check=True)
        yield both
    finally:
        for host in both:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def ended(processes, seconds):
    """(statuses, errors) once all have ended; they have to within so many seconds."""
    until, errors = time.monotonic() + seconds, []
    try:
        errors = [process.communicate(timeout=max(1.0, until - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], errors


def test_a_lost_worker_ends_the_job_with_its_name_and_the_same_command_goes_on(
    config_file,  # noqa: F811
    tmp_path,
    hosts,
):
    """Begun by torchrun, gone on with as Slurm starts processes; the losses are those of one process on one host."""
    assert main(arguments(config_file, tmp_path / "whole", 8)) == 0
    out = tmp_path / "out"
    run = ["-m", "recipes.train_embedder", *arguments(config_file, out, 4, "training.save_steps=1")]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", PORT]
    started = [host.start(*launcher, "--node-rank", str(host.number), *run) for host in hosts]
    while not (out / "checkpoint-1" / "trainer_state.json").exists():
        assert all(process.poll() is None for process in started), ended(started, 1)
        time.sleep(0.02)
    lost = worker(started[1].pid, 1)
    os.kill(lost, signal.SIGKILL)
    statuses, errors = ended(started, 90)
    assert statuses == [1, 1]  # torchrun's
    assert f"stopped: process 1 (host node-b, process {lost}) is gone" in errors[0], errors[0][-3000:]
    assert "is complete: the same command goes on from it" in errors[0] and "exitcode  : 75" in errors[0]
    assert len(list(Path(out).glob("checkpoint-*"))) < int(EXACT[2].partition("=")[2])
    environment = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    started = [host.start(*run, **environment, RANK=str(host.number)) for host in hosts]
    statuses, errors = ended(started, 240)
    assert statuses == [0, 0], errors
    assert "going on from" in errors[0]
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
