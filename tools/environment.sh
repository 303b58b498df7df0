# What make_env.sh and make_vllm_env.sh have in common; they source it from the repository root. Needs ENV (the folder of
# the virtual environment) and TARGET (what `make` makes). torch goes first: where there is no NVIDIA GPU and the package
# index would give the CUDA build (gigabytes), it comes from PyTorch's index of CPU builds, or from the one that
# TORCH_CPU_INDEX names.
PYTHON=${PYTHON:-python3}
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make $TARGET: $PYTHON is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
step() { printf '\n== %s (%ss since start)\n' "$1" "$SECONDS"; }
pip() { "$ENV/bin/python" -m pip --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }
has_gpu() { command -v nvidia-smi >/dev/null; }

# grep reads to the end: with -q pip would die of the closed pipe, and pipefail would make that "brings none".
brings_cuda() { pip install --quiet --dry-run --report - "$torch" | grep -E '"name": "nvidia-' >/dev/null; }

make_environment() {
    step "virtual environment $ENV"
    [ -x "$ENV/bin/python" ] || "$PYTHON" -m venv "$ENV"
    pip install -q --upgrade pip
}

# Of the versions in $torch and $torchvision.
install_torch() {
    if "$ENV/bin/python" -c 'import torch' 2>/dev/null; then return; fi
    step "torch"
    if ! has_gpu && brings_cuda; then
        echo "no NVIDIA GPU here, and the package index gives the CUDA build: taking the CPU build of $TORCH_CPU_INDEX"
        pip install --index-url "$TORCH_CPU_INDEX" "$torch" "$torchvision" || {
            cat >&2 <<MESSAGE
make $TARGET: no NVIDIA GPU here, '$torch' of the package index would bring the CUDA packages (gigabytes), and the CPU
build could not be had from $TORCH_CPU_INDEX (pip says why above). Name another source of it and run again, for example:
    TORCH_CPU_INDEX=https://mirror.example/pytorch/cpu make $TARGET
    PIP_FIND_LINKS=/folder/with/cpu/wheels make $TARGET
MESSAGE
            exit 1
        }
    else
        pip install "$torch"
    fi
}
