#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that `make demo`, `make test`, `make check` and `make bench` need.
# torch goes first: on a machine without an NVIDIA GPU the CPU build is required, and the script stops before it would
# download gigabytes of CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make_env: $PYTHON is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
step() { printf '\n== %s (%ss since start)\n' "$1" "$SECONDS"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }

step "virtual environment .venv"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip install -q --upgrade pip

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    step "torch"
    torch=$(grep '^torch==' constraints.txt)
    if ! command -v nvidia-smi >/dev/null && pip install --quiet --dry-run --report - "$torch" | grep -qE '"name": "nvidia-'; then
        cat >&2 <<MESSAGE
make_env: no NVIDIA GPU here, but '$torch' would bring the CUDA packages (gigabytes).
Point pip at an index or a folder with the CPU build and run again, for example:
    PIP_EXTRA_INDEX_URL=<the CPU wheel index of PyTorch> make demo
    PIP_FIND_LINKS=/folder/with/cpu/wheels make demo
MESSAGE
        exit 1
    fi
    pip install "$torch"
fi

step "mmembed and its extras"
pip install -c constraints.txt --no-deps "$(grep '^torchvision==' constraints.txt)"  # its own pin of torch is not wanted
pip install -c constraints.txt -e '.[train,deepspeed,quant,eval,bench,dev]'
touch .venv/.complete
step "done"
