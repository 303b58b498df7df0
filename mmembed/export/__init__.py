"""A trained model as other programs load it: one file a target, found by the registry.

A target first says whether its runtime can hold the model (`check` raises Refused with the reason), then writes a
folder. Where a runtime has no words for what the model does, nothing is written: a folder that loads and gives other
vectors is worse than none. `mmembed verify` compares what is written with the model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mmembed.registry import Registry

if TYPE_CHECKING:
    from mmembed.export.subject import Subject

NAMES = ("sentence-transformers", "vllm", "merged", "adapter", "onnx")  # of TARGETS, for the command line
MANIFEST = "mmembed_export.json"


class Target:
    """A form in which a model is exported.

    Attributes:
        merges: whether an adapter becomes part of the weights.
        sides: whether instructions of the sides can be written into the folder.
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = True
    sides: ClassVar[bool] = True

    def check(self, subject: Subject) -> None:
        """Raises Refused where the runtime cannot hold the model. Writes nothing."""
        raise NotImplementedError

    def write(self, subject: Subject, folder: Path) -> None:
        """Writes into an empty folder. Raises MmembedError where that cannot be done."""
        raise NotImplementedError


TARGETS: Registry[Target] = Registry("mmembed.export", Target)


def export(subject: Subject, target: str, folder: str | Path, overwrite: bool = False) -> Target:
    """Writes a folder; what lies there survives any failure.

    Raises:
        Refused: the runtime cannot hold the model.
        MmembedError: the folder exists, or cannot be written.
    """
    from mmembed.errors import MmembedError
    from mmembed.export.card import write_card
    from mmembed.staging import put_in_place, staging

    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise MmembedError(f"{folder}: exists; give another --output, or --overwrite")
    writer = TARGETS.build(target)
    writer.check(subject)
    try:
        with staging(folder) as staged:
            staged.mkdir()
            writer.write(subject, staged)
            write_card(staged, subject, writer)
            put_in_place(staged, folder)
    except MmembedError:
        raise
    except OSError as error:
        raise MmembedError(
            f"{folder}: cannot be written ({error}); free disk space or choose another folder"
        ) from error
    return writer
