"""What a killed writer leaves beside its destination is gone after the next write; what others still need stays."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmembed.staging import put_in_place, staging, sweep

ROOT = Path(__file__).parents[2]
STAGE = """
with staging(destination) as staged:
    staged.mkdir()
    (staged / "half").write_text("half")
    die()
"""
SWAP = """
new = destination.with_name("new")
new.mkdir()
real, calls = os.replace, []
def replace(source, target):
    if calls:
        die()
    calls.append(real(source, target))
os.replace = replace
put_in_place(new, destination)
"""
BUILD = """
from mmembed.media import build_once
def build(work):
    (work / "half").write_text("half")
    die()
build_once(destination, build)
"""


def killed(script: str, destination: Path) -> int:
    """Runs a script that kills itself by `die()`; its process id."""
    opening = f"""
import os, signal
from pathlib import Path
from mmembed.staging import put_in_place, staging
destination = Path({str(destination)!r})
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", opening + script], cwd=ROOT)
    assert process.wait(timeout=120) == -signal.SIGKILL
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_next_write_sweeps_what_a_killed_one_left(tmp_path):
    pid = killed(STAGE, tmp_path / "out")
    assert names(tmp_path) == [f".out.writing-{socket.gethostname()}-{pid}"]
    with staging(tmp_path / "out") as staged:
        assert names(tmp_path) == []
        staged.mkdir()
    assert names(tmp_path) == []


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    killed(SWAP, tmp_path / "out")
    assert "out" not in names(tmp_path)
    sweep(tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert names(tmp_path) == ["new", "out"]


def test_a_cache_that_was_killed_while_it_was_built_leaves_nothing(tmp_path):
    from mmembed.media import build_once

    killed(BUILD, tmp_path / "key")
    assert len(names(tmp_path)) == 2  # the lock and the half
    build_once(tmp_path / "key", lambda work: {})
    assert set(names(tmp_path)) - {"key.lock"} == {"key"}


@pytest.mark.parametrize(
    "name",
    [
        f".out.writing-{socket.gethostname()}-{os.getppid()}",  # alive
        f".out.writing-elsewhere.{socket.gethostname()}-4194305",  # nobody's number here, but another host's
        f".out.b.old-{socket.gethostname()}-4194305",  # of another destination
        ".out.notes",
    ],
)
def test_what_is_not_left_behind_stays(name, tmp_path):
    (tmp_path / name).mkdir()
    sweep(tmp_path / "out")
    assert names(tmp_path) == [name]


def test_one_process_stages_two_parts_of_a_destination(tmp_path):
    with staging(tmp_path / "out", "objective") as objective:
        objective.write_text("weights")
        with staging(tmp_path / "out") as folder:
            folder.mkdir()
            assert objective.exists()
            put_in_place(folder, tmp_path / "out")
        assert objective.exists()
    assert names(tmp_path) == ["out"]


def test_a_failing_move_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "out")
    assert names(tmp_path) == ["out"]
