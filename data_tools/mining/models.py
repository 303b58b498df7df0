"""The retriever and the teacher of a run, and how their folder tells whether they are those of before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.files import digest, write_whole
from data_tools.mining.retrievers import RETRIEVERS, Encoder, Retriever
from data_tools.mining.teachers import TEACHERS, Teacher
from data_tools.mining.teachers.embedder import EmbedderTeacher
from data_tools.mining.teachers.late_interaction import LateInteraction
from mmembed.config.blocks import TypedBlock
from mmembed.errors import MmembedError
from mmembed.media import MediaStore

SAME_MODEL = 0.999  # least cosine of the vectors of a fixed text, as of `mmembed.inference.encoding`


class Models:
    """Retriever and teacher of a run, loaded when something has to be computed with them.

    Args:
        folder: holds what they were when its shards were computed; without shards it is free for others.
        retriever, teacher: their blocks, where the run has one.
        overwrite: what another one computed may be replaced.

    Raises:
        MmembedError: there is no such model, or the folder holds what another one computed.
    """

    def __init__(
        self, folder: Path, retriever: TypedBlock | None, teacher: TypedBlock | None, overwrite: bool = False
    ) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.retriever: Retriever | None = None if retriever is None else RETRIEVERS.build(retriever)
        self.teacher: Teacher | None = None if teacher is None else TEACHERS.build(teacher)
        self._blocks = {"retriever": retriever, "teacher": teacher}
        self._states: dict[str, dict[str, Any]] = {}
        self._noted: dict[str, bytes] = {}  # what the folder says
        self.of_retriever = self._recognise("retriever", retriever, self.retriever)
        self.of_teacher = self._recognise("teacher", teacher, self.teacher)

    def load(self, one: Retriever | Teacher, media: MediaStore) -> None:
        """Raises MmembedError where the model behind the same name has changed since the folder was begun."""
        one.load(media)
        encoder = one.encoder if isinstance(one, EmbedderTeacher) else one
        if isinstance(encoder, Encoder | LateInteraction):
            self.check("teacher" if one is self.teacher else "retriever", encoder.probe())

    def block(self, name: str) -> TypedBlock:
        """That of the retriever or the teacher."""
        block = self._blocks[name]
        assert block is not None, "asked of those there are"
        return block

    def check(self, name: str, now: NDArray[np.float32] | None) -> None:
        """Raises MmembedError where the vector of a fixed text is not that of before."""
        state = self._states[name]
        if now is None:
            return
        if not np.isfinite(now).all():
            raise MmembedError(f"{name}: the vector of a fixed text holds NaN or infinity; load the model in float32")
        before = None if state["probe"] is None else np.array(state["probe"])
        if before is None:
            state["probe"] = [round(float(x), 6) for x in now]
        elif before.shape != now.shape or before @ now < SAME_MODEL * np.linalg.norm(before) * np.linalg.norm(now):
            raise MmembedError(
                f"{self.folder}: holds vectors of another {name} ({len(before)} dimensions) than {state['block']} is "
                f"now ({len(now)} dimensions); choose another output, or delete {self.folder}"
            )

    def keep(self, name: str) -> None:
        """Notes whose shards the folder holds. To be called when one is complete."""
        state = json.dumps(self._states[name]).encode()
        if state != self._noted.get(name):
            write_whole(self._file(name), state)
            self._noted[name] = state

    def _recognise(self, name: str, block: TypedBlock | None, one: Retriever | Teacher | None) -> str:
        if one is None:
            return ""
        found, file = digest(one.fingerprint()), self._file(name)
        self._states[name] = {"fingerprint": found, "block": block, "probe": None}
        if file.exists():
            noted = file.read_bytes()
            state = json.loads(noted)
            if state["fingerprint"] == found:
                self._states[name], self._noted[name] = state, noted
            elif not self.overwrite:
                raise MmembedError(
                    f"{self.folder}: was computed by another {name} ({state['block']}; now {block}, or its files have "
                    "changed); choose another output, or set overwrite: true to compute it again"
                )
        return found

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"
