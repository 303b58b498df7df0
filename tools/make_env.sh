#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that `make demo`, `make test`, `make check` and `make bench` need.
# torch goes first: where there is no NVIDIA GPU and the package index would give the CUDA build (gigabytes), torch and
# torchvision come from PyTorch's index of CPU builds, or from the one that TORCH_CPU_INDEX names.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make_env: $PYTHON is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
step() { printf '\n== %s (%ss since start)\n' "$1" "$SECONDS"; }
torch=$(grep '^torch==' constraints.txt)
torchvision=$(grep '^torchvision==' constraints.txt)
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }

# grep reads to the end: with -q pip would die of the closed pipe, and pipefail would make that "brings none".
brings_cuda() { pip install --quiet --dry-run --report - "$torch" | grep -E '"name": "nvidia-' >/dev/null; }

step "virtual environment .venv"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip install -q --upgrade pip

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    step "torch"
    if ! command -v nvidia-smi >/dev/null && brings_cuda; then
        echo "no NVIDIA GPU here, and the package index gives the CUDA build: taking the CPU build of $TORCH_CPU_INDEX"
        pip install --index-url "$TORCH_CPU_INDEX" "$torch" "$torchvision" || {
            cat >&2 <<MESSAGE
make_env: no NVIDIA GPU here, '$torch' of the package index would bring the CUDA packages (gigabytes), and the CPU build
could not be had from $TORCH_CPU_INDEX (pip says why above). Name another source of it and run again, for example:
    TORCH_CPU_INDEX=https://mirror.example/pytorch/cpu make demo
    PIP_FIND_LINKS=/folder/with/cpu/wheels make demo
MESSAGE
            exit 1
        }
    else
        pip install "$torch"
    fi
fi

step "mmembed and its extras"
pip install -c constraints.txt --no-deps "$torchvision"  # its own pin of torch is not wanted
pip install -c constraints.txt -e '.[train,deepspeed,quant,eval,data,bench,dev]'
touch .venv/.complete
step "done"
