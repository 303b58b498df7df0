#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that `make demo`, `make test`, `make check` and `make bench` need.
set -euo pipefail
cd "$(dirname "$0")/.."
ENV=.venv TARGET=env
source tools/environment.sh
torch=$(grep '^torch==' constraints.txt)
torchvision=$(grep '^torchvision==' constraints.txt)

make_environment
install_torch

step "mmembed and its extras"
pip install -c constraints.txt --no-deps "$torchvision"  # its own pin of torch is not wanted
pip install -c constraints.txt -e '.[train,deepspeed,quant,audio,eval,data,bench,ray,serve,onnx,dev]'

# gradio asks for pillow<13 and runs with 13, of which everything else here is. It and what it needs are 34 MB, playwright 54 MB.
step "gradio"
pip install -c constraints.txt --no-deps gradio
pip install -c constraints.txt -r <("$ENV/bin/python" -c '
from importlib.metadata import requires
print(*(one for one in requires("gradio") if not one.startswith("pillow") and "extra ==" not in one), sep="\n")')
touch .venv/.complete
step "done"
