"""vLLM's own server with the arguments that a model of ours needs.

The process becomes the server (`exec`), so there is nothing in between. What differs from vLLM's defaults: it pools, in
the way the model was trained with; pictures are fetched from no host that was not named, which vLLM would from any; it
listens to this machine alone; a key is in its environment, where a process list does not show it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmembed.errors import ConfigError, MmembedError
from mmembed.packaged import resolve
from mmembed.vllm_environment import find_vllm, flags, is_for_cpus

MANIFEST = "mmembed_export.json"  # of `mmembed export`
NO_HOST = "none.invalid"  # a name that nobody can have (RFC 2606); without any, vLLM fetches from all
MEAN = {"seq_pooling_type": "MEAN"}  # of a bare backbone, as `Embedder.from_pretrained` pools it
CPU_SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # gigabytes; a pooling model keeps no cache behind a request


def find(python: str | None) -> str | None:
    """The interpreter that has vLLM. Raises MmembedError where one was named that is none."""
    if python is None:
        return find_vllm()
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise MmembedError(f"--vllm-python: {python} is no interpreter; correct the path")
    return python


def is_exported(model: str) -> bool:
    """Whether a folder was written by `mmembed export --to vllm`."""
    manifest = read_manifest(model)
    return manifest is not None and manifest.get("target") == "vllm"


def unservable(model: str) -> str | None:
    """Why vLLM would give other vectors of this folder than mmembed does; None where it does not."""
    manifest, folder = read_manifest(model), Path(resolve(model))
    if manifest is not None and manifest.get("target") != "vllm":
        return f"an export for {manifest.get('target')}; run `mmembed export --to vllm`"
    if manifest is None and (folder / "mmembed.json").is_file():
        return (
            "a checkpoint of mmembed, whose prompt, pooling and adapter vLLM does not read; run `mmembed export --to "
            "vllm`, and serve what that writes"
        )
    return None


def read_manifest(model: str) -> dict[str, Any] | None:
    """What `mmembed export` wrote beside a model. Raises ConfigError where it cannot be read."""
    file = Path(resolve(model)) / MANIFEST
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); export the model again") from error


def command_of(
    python: str,
    model: str,
    name: str,
    *,
    host: str,
    port: int,
    dtype: str,
    trust_remote_code: bool,
    hosts: Sequence[str],
    further: Sequence[str],
) -> list[str]:
    """The command line of the server.

    Args:
        hosts: from which pictures may be fetched.
        further: `key=value` of vLLM's own options; they win over ours.
    """
    folder = Path(resolve(model))
    options: dict[str, object] = {"host": host, "port": port, "served_model_name": name}
    options["allowed_media_domains"] = list(hosts) or [NO_HOST]
    if dtype != "auto":
        options["dtype"] = dtype
    if trust_remote_code:
        options["trust_remote_code"] = True
    manifest = read_manifest(model)
    if manifest is None:
        told = flags({"runner": "pooling", "convert": "embed", "pooler_config": MEAN})
    else:  # files among them are named as they lie in the folder
        told = [str(folder / one) if (folder / one).is_file() else str(one) for one in manifest.get("serve", ())]
    options |= _options(further)
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *told, *flags(options)]


def environment_of(python: str, key: str | None) -> dict[str, str]:
    """The environment of the server: ours, and what it is told by it."""
    usual = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    if is_for_cpus(python):
        usual |= CPU_SPACE
    return {**usual, **os.environ, **({} if key is None else {"VLLM_API_KEY": key})}


def _options(further: Sequence[str]) -> Mapping[str, object]:
    """`key=value` of the command line. Raises MmembedError for one without `=`."""
    found = {}
    for one in further:
        key, equals, value = one.partition("=")
        if not equals or not key.replace("_", "").isalnum():
            raise MmembedError(f"--vllm: found '{one}'; give key=value, for example max_model_len=4096")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise MmembedError(f"--vllm: found '{one}', whose value cannot be read ({error})") from None
    return found
