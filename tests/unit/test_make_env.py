"""The set-up script takes no CUDA packages where there is no GPU: run with an interpreter that only takes notes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = """#!{bash}
echo "$*" >> calls
case "$*" in
    *"import torch"*) exit 1 ;;
    *--dry-run*)
        echo '{{"metadata": {{"name": "{found}"}}}}'
        for i in {{1..9000}}; do echo '"description": "a report is longer than what a pipe holds"'; done ;;
    *--index-url*) exit {status} ;;
esac
"""


def set_up(folder, found, status=0, gpu=False):
    """Runs the script where the package index gives torch with a package called `found`; (its result, pip's calls)."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "make_env.sh", folder / "tools")
    (folder / "constraints.txt").write_text("torch==2.13.0\ntorchvision==0.28.0\n")
    for place in (folder / ".venv" / "bin", folder / "bin"):
        place.mkdir(parents=True)
    for tool in ("bash", "cat", "dirname", "env", "grep", "touch"):
        (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    if gpu:
        (folder / "bin" / "nvidia-smi").symlink_to(str(shutil.which("true")))
    fake = folder / ".venv" / "bin" / "python"
    fake.write_text(INTERPRETER.format(bash=shutil.which("bash"), found=found, status=status))
    fake.chmod(0o755)
    environment = {"PATH": str(folder / "bin"), "PYTHON": sys.executable, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [str(folder / "tools" / "make_env.sh")], cwd=folder, env=environment, capture_output=True, text=True
    )
    calls = [
        line for line in (folder / "calls").read_text().splitlines() if " install " in line and "dry-run" not in line
    ]
    return done, calls


def test_cpu_builds_come_from_the_index_of_pytorch(tmp_path):
    done, calls = set_up(tmp_path, "nvidia-cublas")
    assert done.returncode == 0, done.stderr
    torch = next(call for call in calls if "torch==2.13.0" in call)
    assert "--index-url https://download.pytorch.org/whl/cpu torch==2.13.0 torchvision==0.28.0" in torch
    assert (tmp_path / ".venv" / ".complete").exists()


@pytest.mark.parametrize(("found", "gpu"), [("sympy", False), ("nvidia-cublas", True)], ids=["cpu index", "gpu"])
def test_else_torch_comes_from_the_package_index(tmp_path, found, gpu):
    done, calls = set_up(tmp_path, found, gpu=gpu)
    assert done.returncode == 0, done.stderr
    assert any(call.endswith("install torch==2.13.0") for call in calls)
    assert not any("--index-url" in call for call in calls)


def test_without_a_cpu_build_the_script_ends_and_says_so(tmp_path):
    done, calls = set_up(tmp_path, "nvidia-cublas", status=1)
    assert done.returncode == 1
    assert "TORCH_CPU_INDEX=" in done.stderr and "PIP_FIND_LINKS=" in done.stderr
    assert not (tmp_path / ".venv" / ".complete").exists()
    assert not any("torch==2.13.0" in call for call in calls if "--index-url" not in call)
