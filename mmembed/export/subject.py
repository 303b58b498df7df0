"""What is exported: a checkpoint with its adapter merged, and what the user adds to it for other runtimes.

What other runtimes cannot hold is found out here in one place, by asking the model itself, and each target refuses what
concerns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmembed.backbones import resolve_backbone
from mmembed.backbones.loading import DTYPES
from mmembed.errors import ConfigError, MmembedError, nearest
from mmembed.export.merging import merged
from mmembed.export.probing import Probe, probes
from mmembed.heads import Head
from mmembed.models.checkpoint import load_checkpoint
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.folder import SETTINGS, read_settings, settle
from mmembed.pooling.last_token import LastToken
from mmembed.preprocess import Preprocessor


class Refused(MmembedError):
    """A runtime cannot hold this model; the message says why and what to do."""


@dataclass
class Subject:
    """A model to export.

    Attributes:
        path: the checkpoint as the user named it.
        model: in float32, without an adapter.
        adapter: type of the adapter that was merged; `none` where there was none.
        dtype: of the weights that are written.
        instructions: side -> the instruction of its inputs that bring none.
        dims: lengths that a vector may be cut to (Matryoshka).
        precision: in which vectors are meant to be stored.
        licence, data, metrics: for the model card.
    """

    path: str
    model: EmbeddingModel
    preprocessor: Preprocessor
    adapter: str = "none"
    dtype: torch.dtype = torch.float32
    instructions: Mapping[str, str] = field(default_factory=dict)
    dims: tuple[int, ...] = ()
    precision: str = "float32"
    licence: str | None = None
    data: tuple[str, ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()

    @property
    def reranks(self) -> bool:
        return self.model.settings.head is not None

    @property
    def pooling(self) -> str:
        return str(vars(type(self.model.pooling))["name"])

    @property
    def multimodal(self) -> bool:
        return self.model.family.multimodal

    @property
    def base(self) -> str:
        """The backbone as the card names it: a folder by its last part."""
        name = self.model.settings.name_or_path
        return Path(name).name if Path(name).is_dir() else name

    @cached_property
    def unpooled(self) -> dict[str, bool]:
        """What of a prompt is read by the backbone and left out of pooling: `bare` of inputs without an instruction,
        `told` of those with one. The last token's pooling asks for no mask."""
        if isinstance(self.model.pooling, LastToken):
            return {"bare": False, "told": False}
        rows = {
            name: [probe.item for probe in self.probes if bool(probe.instruction) == (name == "told")]
            for name in ("bare", "told")
        }
        return {name: any(row.hidden for row in self.preprocessor.tokenize(items)) for name, items in rows.items()}

    @cached_property
    def probes(self) -> list[Probe]:
        return probes(self.preprocessor)

    @property
    def masked(self) -> bool:
        """Whether inputs as the exported folder writes them have tokens that pooling leaves out."""
        return self.unpooled["bare"] or (bool(self.instructions) and self.unpooled["told"])

    @property
    def spoken(self) -> list[Probe]:
        """The fixed inputs that a runtime's own pooling can hold: without instructions where their tokens are left out;
        where a side has an instruction of its own, those inputs have it."""
        kept = [probe for probe in self.probes if probe.instruction is None or not self.unpooled["told"] or self.masked]
        return [
            probe if probe.instruction else replace(probe, instruction=self.instructions.get(probe.role))
            for probe in kept
        ]


def load_subject(
    path: str,
    *,
    dtype: str = "auto",
    instructions: Mapping[str, str] | None = None,
    dims: Sequence[int] = (),
    precision: str = "float32",
    trust_remote_code: bool = False,
    merge: bool = True,
    **card: Any,
) -> Subject:
    """Loads a checkpoint to export it.

    Args:
        dtype: of the weights that are written; auto: that of the checkpoint's.
        merge: make the adapter part of the weights.

    Raises:
        CheckpointError: it cannot be loaded; its backbone is gone.
        MmembedError: an option does not fit the model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: there is no '{dtype}'; {nearest(dtype, [*DTYPES, 'auto'])}")
    model, preprocessor = load_checkpoint(path, "float32", trust_remote_code=trust_remote_code)
    adapter = model.settings.adapter_type
    stored = DTYPES[dtype] if dtype != "auto" else _stored_dtype(path)
    subject = Subject(
        path,
        merged(model) if merge else model,
        preprocessor,
        adapter,
        stored,
        dict(instructions or {}),
        tuple(sorted(set(dims), reverse=True)),
        precision,
        **card,
    )
    _check(subject)
    return subject


def _check(subject: Subject) -> None:
    size = subject.model.embedding_size
    if subject.reranks and (subject.dims or subject.precision != "float32"):
        raise MmembedError(
            f"{subject.path}: is a reranker, whose score has no dimensions; leave out --dims and --precision"
        )
    for dim in subject.dims:
        if not 0 < dim <= size:
            raise MmembedError(f"--dims {dim}: a vector of this model has {size} dimensions; give 1 to {size}")
    if subject.reranks and "document" in subject.instructions:
        raise MmembedError("--document-instruction: a reranker reads one instruction, the query's; leave it out")


def _stored_dtype(path: str) -> torch.dtype:
    """The type that a checkpoint says its backbone is loaded in, or that of the backbone's own file."""
    from transformers import AutoConfig

    folder = Path(resolve_backbone(path))
    name = path
    if folder.is_dir():
        settle(folder)
        if (folder / SETTINGS).exists():
            settings, _ = read_settings(folder)
            if settings.dtype in DTYPES:
                return DTYPES[settings.dtype]
            name = path if settings.adapter_type == "none" else settings.name_or_path
    found = AutoConfig.from_pretrained(resolve_backbone(name)).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def is_pair_head(subject: Subject) -> bool:
    """Whether a reranker's score is a linear map of a pair's last hidden state."""
    projection = subject.model.projection
    return isinstance(projection, Head) and not projection.lists
