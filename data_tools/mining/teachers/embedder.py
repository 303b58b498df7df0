"""Another embedder as the teacher: the similarity of its vectors. For pictures, too, where it reads them."""

from __future__ import annotations

from typing import Any, ClassVar

from data_tools.mining.retrievers import RETRIEVERS, Encoder
from data_tools.mining.teachers import Teacher
from mmembed.errors import ConfigError
from mmembed.media import MediaStore


class EmbedderTeacher(Teacher):
    """An embedder.

    Args:
        retriever: a block of a retriever with vectors.
    """

    name: ClassVar[str] = "embedder"

    def __init__(self, retriever: str | dict[str, Any] = "mmembed") -> None:
        built = RETRIEVERS.build(retriever)
        if not isinstance(built, Encoder):
            raise ConfigError(f"teacher.retriever: '{built.name}' has no vectors; name an embedder")
        self.encoder, self.reads = built, built.reads

    def fingerprint(self) -> Any:
        return [self.name, self.encoder.fingerprint()]

    def load(self, media: MediaStore) -> None:
        self.encoder.load(media)
