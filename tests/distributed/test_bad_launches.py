"""Launches that cannot work end with one message, an exit status and no hang: through the real command."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import yaml

from mmembed.config import load_config
from mmembed.models.embedding_model import settings_of
from tests.recipes.conftest import backbone, config_file, data  # noqa: F401  (fixtures)
from tests.runs import ROOT, launch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_source_smaller_than_the_batch_of_all_processes(config_file):  # noqa: F811
    """40 records: enough for 25 rows of one process, too few for 50 of two."""
    done = launch("ddp", "--config", str(config_file), "training.per_device_train_batch_size=25", succeeds=False)
    assert "error: data source 'text.jsonl' has 40 rows" in done.stderr and "50" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_a_second_stage_of_qlora_under_zero3(config_file, tmp_path):  # noqa: F811
    """The config does not name the adapter, the folder does; it has no weights, so none were read before."""
    first = tmp_path / "first"
    first.mkdir()
    config = load_config(config_file, ["adapter={type: qlora, r: 4}", "model.dtype=auto"])
    described = {"format": 1, "settings": asdict(settings_of(config))}
    (first / "mmembed.json").write_text(json.dumps(described))
    second = yaml.safe_load(config_file.read_text())
    second |= {"model": {"name_or_path": str(first)}, "adapter": {"dropout": 0.1}}
    config_file.write_text(yaml.safe_dump(second))
    done = launch("zero3", "--config", str(config_file), succeeds=False)
    assert "error: adapter.type 'qlora' + ZeRO-3: bitsandbytes keeps" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_a_first_process_that_is_not_there(config_file):  # noqa: F811
    """What `srun` would start on the second host, with the first one down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "recipes/train_embedder.py", "--config", str(config_file), "training.ddp_timeout=2"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **address}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"process 1: cannot reach the first process at 127.0.0.1:{port} within 2 s" in error
    assert "MASTER_ADDR" in error and "--main_process_ip" in error and "training.ddp_timeout" in error
    assert "Traceback" not in done.stderr and time.monotonic() - started < 110
