"""What a local engine's answers depend on, without loading it: the files of the model, and some of the options."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mmembed.errors import ConfigError
from mmembed.models.files import model_digest, model_folder

_OF_SPEED = frozenset({
    "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager",
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_prefix_caching", "cpu_offload_gb",
})  # fmt: skip


def model_identity(model: str, where: str) -> str:
    """A digest of the model's files; of a hub's name (`owner/name`) the name.

    Raises:
        ConfigError: what can only be a path leads nowhere.
    """
    named = not os.path.isabs(model) and not model.startswith(".") and model.count("/") < 2
    if not named and not model_folder(model).is_dir():
        raise ConfigError(f"{where}.model: there is no folder {model}; correct it")
    return model_digest(model)


def settings(options: Mapping[str, object]) -> dict[str, object]:
    """Those of an engine's options that its answers depend on."""
    return {key: value for key, value in options.items() if key not in _OF_SPEED}
