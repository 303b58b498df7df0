"""Shows an `Embedder` to mteb as one of its encoders, and a `Reranker` as one of its cross-encoders.

mteb hands over batches of columns (`text`, `image`, `video` as frames) and says which side of a task they are. Here
that becomes contents, a role and an instruction. Texts are collected before encoding, so that the embedder sorts all of
them by length and packs its own batches; pictures are encoded a block at a time, because decoded pixels are what fills
memory.

    queries                          role query, with the task's instruction
    documents                        role document, without one unless the task or the user gives one
    sentence pairs, labelled texts   role query, with the task's instruction, on both sides (E5-Mistral, NV-Embed)

A cross-encoder gets pairs of a query and a candidate, the candidates of a query one behind another, so that what they
begin with is computed once. mteb ranks by the scores it returns: these are logits, of which none are equal by rounding.

A model that was trained without instructions must not meet them here: under causal attention a prefix changes every
vector behind it. `Instructions.use_tasks` says whether the tasks' own are given.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import yaml
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from mmembed.content import Content, Image, Role, Text, Video
from mmembed.errors import ConfigError, MmembedError, nearest

PAIRS_AT_ONCE = 16384  # of texts
PICTURES_AT_ONCE = 256  # decoded 320-pixel pictures: about 80 MB
VIDEOS_AT_ONCE = 16  # 8 frames of 720 lines each: about 350 MB
NO_TEXT = "."  # mteb wants a vector of every document, Embedder.encode takes no blank one


class Encodes(Protocol):
    """What evaluation needs of a model: `mmembed.Embedder` has it, a baseline may."""

    def encode(self, contents: Sequence[Any], *, role: Role, instruction: str | None) -> Any: ...

    def similarity(self, a: Any, b: Any) -> Any: ...


class Scores(Protocol):
    """What evaluation needs of a reranker: (N,) scores of pairs, the larger the more relevant."""

    def __call__(self, pairs: Sequence[Any], *, instruction: str | None) -> Any: ...


@dataclass(frozen=True)
class Instructions:
    """What a model is told for each task: the task's own instruction, if wanted, unless the user's file has another.

    The file (YAML or JSON) maps a task name or a glob to a text for queries, to `{query: ..., document: ...}`, or to
    null for none: the last matching line wins.
    """

    overrides: Mapping[str, str | Mapping[str, str | None] | None] = field(default_factory=dict)
    use_tasks: bool = True

    @classmethod
    def read(cls, path: Path, task_names: Iterable[str], use_tasks: bool = True) -> "Instructions":
        """Raises ConfigError: not a mapping, a key that matches no task, or a side that is no role."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: found a {type(content).__name__}; write one `task name: instruction` a line")
        names = list(task_names)
        for pattern, value in content.items():
            if not any(fnmatch.fnmatchcase(name, str(pattern)) for name in names):
                raise ConfigError(f"{path}: '{pattern}' matches no task of this run; {nearest(str(pattern), names)}")
            for side in value if isinstance(value, dict) else ():
                if side not in ("query", "document"):
                    raise ConfigError(f"{path}: {pattern}.{side}: {nearest(str(side), ('query', 'document'))}")
        return cls(content, use_tasks)

    def find(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """The instruction for one side of a task; `prompt_type` None is a symmetric task."""
        side: Role = "document" if prompt_type == PromptType.document else "query"
        wanted: Any = task.prompt if self.use_tasks else None
        for pattern, value in self.overrides.items():
            if fnmatch.fnmatchcase(task.name, pattern):
                wanted = value
        if isinstance(wanted, Mapping):
            return wanted.get(side) or None
        return wanted if wanted and side == "query" else None


class MtebEncoder(AbsEncoder):
    """An mteb encoder around anything that `Encodes`.

    Args:
        name: shown by mteb; without a slash it becomes `mmembed/<name>`.
        modalities: what the model reads; mteb refuses tasks with others.
    """

    def __init__(
        self, embedder: Encodes, name: str, *, modalities: Sequence[str], instructions: Instructions | None = None
    ) -> None:
        self.embedder = embedder
        self.instructions = instructions or Instructions()
        self.mteb_model_meta = _meta(name, modalities)
        self.size: int | None = None  # of every vector, once there is one

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """(N, E) vectors as a numpy array, or a list of (T, E) arrays of a multi-vector model.

        Raises:
            MmembedError: a vector is not finite, or not as long as the others; task and row are named.
        """
        role: Role = "document" if prompt_type == PromptType.document else "query"
        instruction = self.instructions.find(task_metadata, prompt_type)
        encoded = [self.embedder.encode(block, role=role, instruction=instruction) for block in _blocks(inputs)]
        side = f"{task_metadata.name}, {'documents' if role == 'document' else 'queries'}"
        if isinstance(encoded[0], list):
            several = [vectors for block in encoded for vectors in block]
            self._check([np.isfinite(one).all() for one in several], [np.shape(one)[-1] for one in several], side)
            return several
        blocks = [np.asarray(block, dtype=np.float32) for block in encoded]
        finite = np.concatenate([np.isfinite(block).all(axis=-1) for block in blocks])  # (N,)
        self._check(finite, [block.shape[-1] for block in blocks for _ in block], side)
        return np.concatenate(blocks)

    def _check(self, finite: Any, sizes: Sequence[int], side: str) -> None:
        self.size = self.size or next(iter(sizes), None)
        if wrong := [number for number, size in enumerate(sizes) if size != self.size]:
            raise MmembedError(f"{side}, row {wrong[0]}: the model gave {sizes[wrong[0]]} numbers, for others "
                               f"{self.size}; all vectors have to be equally long")  # fmt: skip
        if not np.all(finite):
            raise MmembedError(f"{side}, row {int(np.argmin(finite))}: the model gave NaN or infinity; try --dtype "
                               "float32, and look at that row")  # fmt: skip

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N, M): cosine of single vectors, the embedder's own late interaction of multi-vectors."""
        if isinstance(embeddings2, list):
            return torch.as_tensor(self.embedder.similarity(list(embeddings1), embeddings2))
        return super().similarity(embeddings1, embeddings2)


class MtebReranker:
    """An mteb cross-encoder around a reranker. mteb gives it tasks with `top_ranked` candidates only.

    Args:
        score: pairs of contents and an instruction -> (N,) scores; `Reranker.score` with its options filled in.
        name, modalities, instructions: as of `MtebEncoder`.
    """

    def __init__(
        self, score: Scores, name: str, *, modalities: Sequence[str], instructions: Instructions | None = None
    ) -> None:
        self.score = score
        self.instructions = instructions or Instructions()
        self.mteb_model_meta = _meta(name, modalities, model_type=["cross-encoder"])

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        **kwargs: Any,
    ) -> Any:
        """(N,) float32 scores of queries with documents, row by row."""
        instruction = self.instructions.find(task_metadata, PromptType.query)
        blocks = [self.score(block, instruction=instruction) for block in _pairs(inputs1, inputs2)]
        scores = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
        if not np.isfinite(scores).all():
            raise MmembedError(f"{task_metadata.name}, pair {int(np.argmin(np.isfinite(scores)))}: the reranker gave "
                               "NaN or infinity; try --dtype float32, and look at that pair")  # fmt: skip
        return scores


@dataclass(frozen=True)
class Orders:
    """The orders of a reranker that answers in words, as scores: 0 for the first document of a query, then -1, -2, ...

    Args:
        rank_all: of `ListwiseReranker`. It leaves open what the model does not name: give candidates as a first stage
            ranks them.
    """

    rank_all: Callable[..., list[list[int]]]

    def __call__(self, pairs: Sequence[Any], *, instruction: str | None) -> Any:
        """(N,) float32; the documents of a query stand one behind another."""
        queries: list[Any] = []
        lists: list[list[Any]] = []
        for query, document in pairs:
            if not queries or queries[-1] != query:
                queries.append(query)
                lists.append([])
            lists[-1].append(document)
        scores = []
        for places in self.rank_all(queries, lists, instructions=[instruction] * len(queries)):
            own = np.zeros(len(places), dtype=np.float32)
            own[places] = -np.arange(len(places))
            scores.append(own)
        return np.concatenate(scores)


def _meta(name: str, modalities: Sequence[str], **more: Any) -> ModelMeta:
    named = name if "/" in name else f"mmembed/{name}"
    return ModelMeta.create_empty(
        overwrites={"name": named, "revision": "local", "modalities": list(modalities), **more}
    )


def _pairs(
    queries: Iterable[Mapping[str, Any]], documents: Iterable[Mapping[str, Any]]
) -> Iterator[list[tuple[Content, Content]]]:
    """Pairs in blocks, smaller ones where there are pictures. All of a query are in one: some rerankers read lists."""
    block: list[tuple[Content, Content]] = []
    for left, right in zip(queries, documents, strict=True):
        block += zip(contents_of(left), contents_of(right), strict=True)
        if len(block) >= _at_once({*left, *right}, PAIRS_AT_ONCE):
            whole = len(block) - 1
            while whole and block[whole - 1][0] == block[-1][0]:  # where the last query begins
                whole -= 1
            if whole:
                yield block[:whole]
                block = block[whole:]
    if block:
        yield block


def _blocks(inputs: Iterable[Mapping[str, Any]]) -> Iterator[list[Content]]:
    """All contents in one block while they are texts; blocks of `PICTURES_AT_ONCE` once there are pictures."""
    block: list[Content] = []
    for batch in inputs:
        block += contents_of(batch)
        if len(block) >= _at_once(set(batch), math.inf):
            yield block
            block = []
    if block:
        yield block


def _at_once(columns: set[str], texts: float) -> float:
    """How many contents of these columns are in memory together."""
    return VIDEOS_AT_ONCE if "video" in columns else PICTURES_AT_ONCE if "image" in columns else texts


def contents_of(batch: Mapping[str, Any]) -> list[Content]:
    """A content a row of mteb's columns `text`, `image` and `video` (lists of frames); a blank text alone becomes
    `NO_TEXT`."""
    texts, images, videos = batch.get("text"), batch.get("image"), batch.get("video")
    size = len(cast(Sequence[Any], next(column for column in (texts, images, videos) if column is not None)))
    contents: list[Content] = []
    for row in range(size):
        image = images[row] if images is not None else None
        text = texts[row] if texts is not None else ""
        parts: list[Image | Text | Video] = [Image(image)] if image is not None else []
        frames = tuple(map(Image, videos[row])) if videos is not None else ()
        parts += frames if len(frames) == 1 else [Video(frames)] if frames else []
        if text.strip() or not parts:
            parts.append(Text(text if text.strip() else NO_TEXT))
        contents.append(tuple(parts))
    return contents
