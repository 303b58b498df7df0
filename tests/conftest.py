"""Shared fixtures: tiny backbones, built once a session and process."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once
sys.path.insert(0, str(Path(__file__).parent))  # `from families import ...` in every test folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family_folder("qwen3_vl") -> folder of a tiny model of that family."""
    from families import build_family

    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = build_family(name, root)
        return built[name]

    return folder


def pytest_collection_finish() -> None:
    """Everything is imported: what is looked through for garbage, after every training for one, leaves that out."""
    gc.collect()
    gc.freeze()
