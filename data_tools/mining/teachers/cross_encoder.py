"""A cross-encoder folder: what `CrossEncoder` of sentence-transformers loads, sequence classifiers of transformers
too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Item, text_alone
from data_tools.mining.retrievers.sentence_transformer import load_class
from data_tools.mining.teachers import PairTeacher
from mmembed.errors import ConfigError, MmembedError
from mmembed.inference.devices import check_device
from mmembed.media import MediaStore
from mmembed.models.files import model_digest
from mmembed.registry import Positive


class CrossEncoderTeacher(PairTeacher):
    """A cross-encoder with one score a pair.

    Args:
        model: its folder.
        max_length: tokens of a pair; None takes what the model says.
        prompt: put before the query; {instruction} stands for the query's own.
        trust_remote_code: run the python code that the folder brings.
    """

    name: ClassVar[str] = "cross_encoder"

    def __init__(
        self,
        model: str,
        device: str | None = None,
        batch_size: Positive = 32,
        max_length: Positive | None = None,
        prompt: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.device, self.batch_size, self.max_length = model, device, batch_size, max_length
        self.prompt, self.trust_remote_code = prompt, trust_remote_code
        self._model: Any = None

    def fingerprint(self) -> Any:
        if not (Path(self.model) / "config.json").is_file():
            raise ConfigError(f"teacher.model: {self.model} is no folder of a model (config.json)")
        return [self.name, model_digest(self.model), self.max_length, self.prompt]

    def load(self, media: MediaStore) -> None:
        if self._model is not None:
            return
        check_device(self.device)
        self._model = load_class("CrossEncoder")(
            self.model,
            device=self.device,
            max_length=self.max_length,
            local_files_only=True,
            trust_remote_code=self.trust_remote_code,
        )
        if self._model.num_labels != 1:
            raise ConfigError(
                f"teacher.model: {self.model} gives {self._model.num_labels} scores a pair; give a model with one"
            )

    def score(self, queries: Sequence[Item], documents: Sequence[Item]) -> NDArray[np.float32]:
        asked = [
            self.prompt.replace("{instruction}", one.instruction or "") + text_alone(one, self.name) for one in queries
        ]
        pairs = list(zip(asked, (text_alone(one, self.name) for one in documents), strict=True))
        try:
            scores = self._model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        except (ValueError, RuntimeError) as error:
            raise MmembedError(f"teacher: {self.model} cannot score {queries[0]} ({error})") from error
        return np.asarray(scores, np.float32)
