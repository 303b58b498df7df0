"""The clusters of a run, beside its records, and those of earlier runs joined with them: MCL's stages.

    NAME.clusters.npz    keys (N,) and clusters (N,) of the documents of a source, as its run clustered them

A document is known again by its content (`Collection.corpus_keys`), so a corpus may have grown, lie in another order or
elsewhere. The documents that an earlier run did not have are one more cluster of its stage: nothing tells them apart
there, so they may be each other's negatives, but not those of documents that the stage knows, since it never held both
for alike. Were each a cluster of its own, a query with a new positive would have no negatives at all.

Cost: 24 bytes a document on the disk, 1 us a document and earlier run.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.files import write_whole
from mmembed.errors import ConfigError, MmembedError
from mmembed.mining.mcl import composite

SUFFIX = ".clusters.npz"
Rows = NDArray[np.int64]


def write_stage(output: Path, name: str, keys: NDArray[Any], clusters: Rows) -> None:
    """Puts the clusters (N,) of a source in place, whole; keys (N,) of 16 bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, keys=keys, clusters=clusters)
    write_whole(output / f"{name}{SUFFIX}", buffer.getvalue())


def remove_stage(output: Path, name: str) -> None:
    """A run without clusters leaves none of another run behind."""
    (output / f"{name}{SUFFIX}").unlink(missing_ok=True)


def read_stage(output: str, name: str, keys: NDArray[Any]) -> tuple[Rows, int]:
    """What an earlier run has clustered -> (N,) numbers for the documents with these keys, and how many are new.

    Raises:
        ConfigError: its output has no clusters of the source, or knows none of the documents.
        MmembedError: the file is broken.
    """
    file = Path(output) / f"{name}{SUFFIX}"
    if not file.exists():
        there = ", ".join(f"'{one.name.removesuffix(SUFFIX)}'" for one in sorted(Path(output).glob(f"*{SUFFIX}")))
        raise ConfigError(
            f"earlier: {output} holds no clusters of source '{name}' (there are {there or 'none'}); give the output of "
            "a mining run with clusters whose source has this name"
        )
    try:
        with np.load(file) as arrays:
            theirs, clusters = arrays["keys"], arrays["clusters"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MmembedError(f"{file}: no readable clusters ({error}); run that mining again") from error
    _, at, of = np.intersect1d(keys, theirs, assume_unique=True, return_indices=True)
    if not len(at):
        raise ConfigError(
            f"earlier: {output} has clustered none of the {len(keys)} documents of source '{name}'; give a run over "
            "this corpus"
        )
    numbers = np.full(len(keys), clusters.max() + 1, np.int64)
    numbers[at] = clusters[of]
    return numbers, len(keys) - len(at)


def joined(stages: Sequence[Rows]) -> Rows:
    """Clusters (N,) of each stage -> (N,) numbers from 0, equal where all stages agree: `composite`, without gaps."""
    numbers = stages[0]
    for stage in stages[1:]:  # by twos: N x N fits into 64 bits, any number of stages does not
        pairs = composite([numbers, stage], int(max(numbers.max(), stage.max())) + 1)
        numbers = np.unique(pairs, return_inverse=True)[1]
    return numbers
