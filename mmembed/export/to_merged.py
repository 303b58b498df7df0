"""A checkpoint of mmembed without an adapter: whole weights, which need no base model beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mmembed.errors import MmembedError
from mmembed.export import MANIFEST, Target
from mmembed.export.folder import settings_of, write_json
from mmembed.export.subject import Subject
from mmembed.models.checkpoint import save_checkpoint


class ToMerged(Target):
    """Writes the checkpoint."""

    name: ClassVar[str] = "merged"
    sides: ClassVar[bool] = False

    def check(self, subject: Subject) -> None:
        if subject.instructions:
            raise MmembedError(
                "--query-instruction, --document-instruction: a checkpoint of mmembed takes its instructions where it "
                "is used; leave them out"
            )

    def write(self, subject: Subject, folder: Path) -> None:
        model = subject.model
        model.settings = replace(model.settings, dtype=str(subject.dtype).removeprefix("torch."))
        backbone: Any = model.backbone
        backbone.to(subject.dtype)
        save_checkpoint(folder, model, subject.preprocessor)
        write_json(folder / MANIFEST, settings_of(subject, self.name))
