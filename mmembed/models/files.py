"""What the files of a model say before it is loaded: a digest, by which its vectors are recognised as its own, and
whether it gives many vectors a content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmembed.packaged import resolve

WHOLE = 1 << 26  # bytes: larger files are sampled
SAMPLES, SAMPLE = 64, 1 << 16  # a training step changes every tensor, so some of 4 MB of a file


def model_digest(model: str) -> str:
    """Of the files of a folder (large ones: their size and 64 samples); of anything else the name.

    A name says nothing about weights that change behind it: the vector of a fixed text is compared as well.
    """
    folder = model_folder(model)
    if not folder.is_dir():
        return f"name:{model}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
                continue
            for number in range(SAMPLES):
                content.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()


def gives_many(model: str) -> bool:
    """Whether a checkpoint folder names a pooling of many vectors. False of a name, which says nothing."""
    from mmembed.config.blocks import block_type
    from mmembed.models.folder import SETTINGS, read_settings
    from mmembed.pooling import POOLINGS

    folder = model_folder(model)
    if not (folder / SETTINGS).exists():
        return False
    return POOLINGS.get(block_type(read_settings(folder)[0].pooling)).multi_vector


def model_folder(model: str) -> Path:
    """Where its files are, if it is no name."""
    return Path(resolve(model))
