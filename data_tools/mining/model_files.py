"""A digest of a model's files, by which its vectors are recognised as its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE = 1 << 26  # bytes: larger files are sampled
SAMPLES, SAMPLE = 64, 1 << 16  # a training step changes every tensor, so some of 4 MB of a file


def model_digest(model: str) -> str:
    """Of the files of a folder (large ones: their size and 64 samples); of anything else the name.

    A name says nothing about weights that change behind it: the vector of a fixed text is compared as well.
    """
    folder = Path(model)
    if model == "mmembed-nano":
        import mmembed

        folder = Path(str(mmembed.__file__)).with_name("nano")
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
