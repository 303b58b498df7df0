"""The folder of a checkpoint: its files, what `mmembed.json` says, and how a new one takes the place of an old one.

Everything is written beside the destination first and moved in as one folder when all of it is on disk: a full disk
leaves the previous checkpoint as it was, and after a kill either the previous or the new one loads (loading finishes an
interrupted move).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmembed.errors import CheckpointError
from mmembed.models.embedding_model import EmbedderSettings

if TYPE_CHECKING:
    import torch

SETTINGS, ADAPTER, POOLING = "mmembed.json", "adapter_model.safetensors", "pooling.safetensors"
PROBES = "probes.safetensors"  # vectors of fixed inputs, as the model in memory gave them when it was saved
INCOMING = ".mmembed-incoming"  # a complete checkpoint inside the folder that it replaces
FORMAT = 1
GENERATIVE = "generative_reranker"  # kind of a folder whose model answers in words (mmembed.models.generator)


def read_settings(path: str | Path) -> tuple[EmbedderSettings, dict[str, Any]]:
    """The settings of a checkpoint and the whole of `mmembed.json`."""
    file = Path(path) / SETTINGS
    try:
        described = json.loads(file.read_text())
        if described["format"] > FORMAT:
            raise CheckpointError(f"{file}: format {described['format']} is newer than this mmembed; upgrade mmembed")
        if described.get("kind") == GENERATIVE:
            raise CheckpointError(
                f"{path}: is a reranker that answers in words, without vectors or scores; load it with "
                "ListwiseReranker or RationaleReranker"
            )
        settings = {key: value for key, value in described["settings"].items() if key != "trust_remote_code"}
        return EmbedderSettings(**settings), described
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a settings file of mmembed ({error}); restore it from another copy"
        ) from error


def move_into_place(staged: Path, folder: Path) -> None:
    """From the rename on, the new checkpoint is the one that loads: `settle` finishes what a kill interrupts."""
    to_disk(staged)
    if not folder.exists():
        os.replace(staged, folder)
        return
    settle(folder)
    os.replace(staged, folder / INCOMING)
    settle(folder)


def to_disk(folder: Path) -> None:
    """Waits until a folder is on the disk: the content of every file, then the names (POSIX), its own the last."""
    found = list(folder.rglob("*"))
    for file in found:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    for inner in [*(path for path in found if path.is_dir()), folder, folder.absolute().parent]:
        _names_to_disk(inner)


def _names_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems of networks that have no such call
            raise
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Moves a complete checkpoint inside `folder` into its place, file by file; may be interrupted and repeated."""
    incoming = folder / INCOMING
    if not incoming.is_dir():
        return
    try:
        previous = read_settings(folder)[1]["files"] if (folder / SETTINGS).exists() else []
        if (incoming / SETTINGS).exists():  # else everything was moved already
            kept = set(read_settings(incoming)[1]["files"])
            for file in sorted(incoming.iterdir(), key=lambda file: file.name == SETTINGS):
                if file.name == SETTINGS:  # comes last; an adapter left behind would be loaded on top of full weights
                    for name in {*previous, PROBES} - kept:
                        (folder / name).unlink(missing_ok=True)
                if (folder / file.name).is_dir():
                    shutil.rmtree(folder / file.name)
                os.replace(file, folder / file.name)
        incoming.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: was interrupted while it was saved, and could not be completed ({error}); make it writable and "
            "load it again"
        ) from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken ({error}); restore it or train again") from error


def check_fit(file: Path, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise CheckpointError(
            f"{file}: does not fit this architecture ({len(expected.keys() ^ found.keys())} names differ, "
            f"first '{odd}'); it belongs to another backbone or pooling"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{file}: '{name}' is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}; "
                "it belongs to another backbone or pooling"
            )
