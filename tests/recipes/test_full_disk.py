"""A full disk, or a power failure, while a checkpoint is written: the one before survives, a message says what next."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from recipes.train_embedder import main

SMALL, LARGE = "small", "large"


@contextmanager
def tmpfs(folder):
    """A file system of its own at `folder`; yields a function that makes it small or large."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted by root alone: {mounted.stderr.decode().strip()}")

    def resize(to):
        room = {LARGE: 64 * 2**20, SMALL: used(folder) + used(folder / "checkpoint-2") // 2}[to]
        subprocess.run(["mount", "-o", f"remount,size={room // 1024}k", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def file_size_limit(folder):
    """The system refuses to write more than so many bytes into one file: the optimizer's state is the largest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def resize(to):
        largest = max((folder / "checkpoint-2").iterdir(), key=lambda file: file.stat().st_size)
        assert largest.name == "optimizer.pt"
        room = soft if to == LARGE else largest.stat().st_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

    try:
        yield resize
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def used(folder):
    """Bytes in whole pages, as a file system in memory counts them."""
    return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in folder.rglob("*"))


@pytest.mark.parametrize("limit", [tmpfs, file_size_limit], ids=lambda limit: limit.__name__)
def test_a_full_disk_leaves_the_previous_checkpoint(config_file, tmp_path, stop_in_step, capsys, limit):
    out = tmp_path / "out"
    overrides = ["training.save_strategy=steps", "training.save_steps=2", "adapter.r=32", "data.dev=[]"]
    command = ["--config", str(config_file), *overrides]
    with limit(out) as resize:
        stop_in_step(2)
        assert main(command) == 75
        before = {file.name: file.read_bytes() for file in (out / "checkpoint-2").iterdir()}
        resize(SMALL)
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and "Traceback" not in error
        message = error[error.index("error:") :]
        assert "checkpoint-4" in message and "checkpoint-2 is complete: the same command goes on" in message
        assert {file.name: file.read_bytes() for file in (out / "checkpoint-2").iterdir()} == before
        assert [name for name in os.listdir(out) if "checkpoint" in name] == ["checkpoint-2"]
        resize(LARGE)
        assert main(command) == 0
        assert (out / "checkpoint-4" / "trainer_state.json").exists()


def test_a_report_that_can_not_be_written_ends_no_run(config_file, tmp_path, monkeypatch, caplog):
    """It comes after the checkpoint is complete and older ones are gone."""
    from mmembed.training import trainer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_report", full)
    steps = ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1", "data.dev=[]"]
    run = [
        "--config",
        str(config_file),
        *steps,
        "training.save_total_limit=1",
        f"training.output_dir={tmp_path / 'out'}",
    ]
    assert main(run) == 0
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()
    assert "report" in caplog.text and "No space left" in caplog.text


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are named by /proc")
def test_older_checkpoints_go_when_the_new_one_is_on_the_disk(config_file, tmp_path, monkeypatch):
    """The trainer's state, which makes it count, and the names of files and folder among it."""
    out, synced, removed = tmp_path / "out", {}, []
    fsync, rmtree = os.fsync, shutil.rmtree

    def noted(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path] = path.read_bytes() if path.is_file() else sorted(os.listdir(path))

    def remove(path, *rest, **options):
        if Path(path).parent == out and Path(path).name.startswith("checkpoint-"):
            newest = out / f"checkpoint-{1 + int(Path(path).name[-1])}"
            assert synced[newest / "trainer_state.json"] == (newest / "trainer_state.json").read_bytes()
            assert synced[newest] == sorted(os.listdir(newest)) and newest.name in synced[out]
            removed.append(Path(path).name)
        rmtree(path, *rest, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(shutil, "rmtree", remove)
    steps = ["training.max_steps=3", "training.save_strategy=steps", "training.save_steps=1"]
    assert main(["--config", str(config_file), *steps, "training.save_total_limit=1", "data.dev=[]"]) == 0
    assert removed == ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
