"""Modules of exported folders that sentence-transformers has not, and how such a folder is loaded.

    from mmembed.runtimes.sentence_transformers import load
    model = load("folder")                      # a SentenceTransformer; runs no code of the folder

`SentenceTransformer(folder, trust_remote_code=True)` gives the same: the folder holds no code, its modules.json names
the classes of this file, and sentence-transformers imports classes that are not its own on that word alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Transformer
from torch import Tensor

from mmembed.backbones.family import family_of
from mmembed.content import Role, to_content
from mmembed.errors import MmembedError
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Item, Lengths, Preprocessor
from mmembed.prompts import PROMPTS


class LatentAttentionPooling(Module):
    """NV-Embed's pooling (`mmembed.pooling.latent_attention`) over the tokens of the attention mask.

    Args:
        hidden_size: of the backbone.
        pooling: the block of the training config.
    """

    config_keys = ["hidden_size", "pooling"]  # noqa: RUF012 - as the base has it

    def __init__(self, hidden_size: int, pooling: Mapping[str, Any]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.block = dict(pooling)
        self.pooling = POOLINGS.build(self.block, hidden_size=hidden_size)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        states: Tensor = features["token_embeddings"]  # (B, T, H)
        mask: Tensor = features["attention_mask"].bool()  # (B, T)
        features["sentence_embedding"] = self.pooling(states, mask)
        return features

    def get_config_dict(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size, "pooling": self.block}

    def get_embedding_dimension(self) -> int:
        """Numbers of a vector."""
        return self.pooling.embedding_size

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LatentAttentionPooling:
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls(**cls.load_config(model_name_or_path, **where))
        return cls.load_torch_weights(model_name_or_path, model=module, **where)


class PromptedTransformer(Transformer):
    """The backbone behind mmembed's own preprocessing: for models that leave tokens of the prompt out of pooling.

    The mask that the modules behind it see is that of pooling. A prompt of `encode` is the instruction, and
    `encode_query` and `encode_document` say the side. Length limits are the model's own, exactly.

    Args:
        prompted: prompt, lengths, and which tokens end an input, as `mmembed.json` has them.
        options: of `Transformer`.
    """

    def __init__(self, model_name_or_path: str, *, prompted: Mapping[str, Any], **options: Any) -> None:
        super().__init__(model_name_or_path, **options)
        self.prompted = dict(prompted)
        self._preprocessor = Preprocessor(
            self.processor,
            family_of(self.model.config, self.processor),
            PROMPTS.build(self.prompted["prompt"]),
            Lengths(**self.prompted["lengths"]),
            append_eos=self.prompted["append_eos"],
            pool_suffix=self.prompted["pool_suffix"],
        )

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, processing_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        if processing_kwargs:
            raise MmembedError("processing_kwargs: this model's inputs are written as in training; leave them out")
        role: Role = "query" if kwargs.get("task") == "query" else "document"
        batch = self._preprocessor([Item(to_content(_ours(one)), role, prompt or None) for one in inputs])
        return {**batch.tensors, "pooled": batch.pool_mask, "modality": "message"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        pooled: Tensor = features.pop("pooled")  # (B, T)
        features = super().forward(features, **kwargs)
        features["attention_mask"] = pooled.long()
        return features

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "prompted": self.prompted}


def _ours(given: Any) -> Any:
    """A content as mmembed names its parts: here `image` may also be a list."""
    if isinstance(given, Mapping) and isinstance(given.get("image"), list | tuple):
        return {**{key: value for key, value in given.items() if key != "image"}, "images": list(given["image"])}
    return given


CLASSES = {f"{one.__module__}.{one.__name__}": one for one in (LatentAttentionPooling, PromptedTransformer)}


def load(folder: str | Path, **options: Any) -> SentenceTransformer:
    """An exported folder, or its name on the Hub, with mmembed's modules where it names them, and no remote code.

    Args:
        options: of `SentenceTransformer`.
    """
    return SentenceTransformer._load_with_module_classes(str(folder), CLASSES, **options)
