"""With what results were made: versions of packages, and the machine. Light: imports torch where it is asked for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

VERSIONS = ("mmembed", "mteb", "torch", "transformers", "sentence-transformers", "bm25s", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def machine() -> dict[str, Any]:
    import torch

    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip
