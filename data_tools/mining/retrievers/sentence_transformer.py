"""A sentence-transformers folder. What it reads is what the model says: texts, pictures where it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Encoder, Item
from mmembed.content import Image, Role, Text, to_content
from mmembed.errors import ConfigError, MmembedError
from mmembed.inference.devices import check_device
from mmembed.media import MediaStore
from mmembed.models.files import model_digest
from mmembed.registry import Positive


class SentenceTransformerModel(Encoder):
    """A sentence-transformers model.

    Args:
        model: its folder.
        query_prompt, document_prompt: put before texts; {instruction} stands for the query's own. None takes the
            prompts that are saved with the model.
        trust_remote_code: run the python code that the folder brings.
    """

    name: ClassVar[str] = "sentence_transformers"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image"})

    def __init__(
        self,
        model: str,
        device: str | None = None,
        batch_size: Positive = 32,
        truncate_dim: Positive | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.device, self.batch_size, self.truncate_dim = model, device, batch_size, truncate_dim
        self.prompts = {"query": query_prompt, "document": document_prompt}
        self.trust_remote_code = trust_remote_code
        self._model: Any = None

    def fingerprint(self) -> Any:
        if not (Path(self.model) / "modules.json").is_file():
            raise ConfigError(f"retriever.model: {self.model} is no folder of sentence-transformers (modules.json)")
        return [self.name, model_digest(self.model), self.truncate_dim, self.prompts]

    def load(self, media: MediaStore) -> None:
        self._media = media
        if self._model is None:
            check_device(self.device)
            self._model = load_class("SentenceTransformer")(
                self.model, device=self.device, local_files_only=True, trust_remote_code=self.trust_remote_code
            )

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        inputs = [self._input(item) for item in items]
        options: dict[str, Any] = {"batch_size": self.batch_size, "convert_to_numpy": True, "show_progress_bar": False}
        options["truncate_dim"] = self.truncate_dim
        prompt = self.prompts[role]
        if prompt is None:
            encode = self._model.encode_query if role == "query" else self._model.encode_document
            return np.asarray(encode(inputs, **options), np.float32)
        vectors = None
        prompts = [prompt.replace("{instruction}", item.instruction or "") for item in items]
        for one in dict.fromkeys(prompts):
            rows = [row for row, given in enumerate(prompts) if given == one]
            found = np.asarray(self._model.encode([inputs[row] for row in rows], prompt=one, **options), np.float32)
            vectors = np.empty((len(items), found.shape[1]), np.float32) if vectors is None else vectors
            vectors[rows] = found
        assert vectors is not None, "there are items"
        return vectors

    def _input(self, item: Item) -> Any:
        """A str, a picture, or a mapping of both."""
        content = to_content(item.content)
        pictures = [part for part in content if isinstance(part, Image)]
        if len(pictures) > 1 or not all(isinstance(part, Text | Image) for part in content):
            raise MmembedError(f"{item}: sentence-transformers takes a text and one picture at most; leave it out")
        if not pictures:
            return item.text
        kind = ("image", "text") if item.text else "image"
        if not self._model.supports(kind):
            raise MmembedError(
                f"{item}: {self.model} reads {self._model.modalities}, and this is {kind}; choose another retriever"
            )
        picture = self._media.open(pictures[0])
        return {"image": picture, "text": item.text} if item.text else picture


def load_class(name: str) -> Any:
    """A class of sentence-transformers. Raises MmembedError where it is not installed."""
    import mmembed.backbones  # noqa: F401 - lets torchvision import on a CPU before sentence-transformers pulls it in

    try:
        import sentence_transformers
    except ImportError as error:
        raise MmembedError(f"sentence-transformers is not installed ({error}); pip install 'mmembed[mining]'") from None
    return vars(sentence_transformers)[name]
