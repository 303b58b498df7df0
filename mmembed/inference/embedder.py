"""Contents in, vectors out: the public way to use a trained model.

What makes it fast, in the order of what it gains on a CPU:

1. kernels that suit the processor (`mmembed.inference.cpu`);
2. batches are cut from the contents sorted by length, under a budget of padded tokens that fits the processor's cache;
3. texts go through the model without an attention mask where it allows that (right padding under causal attention),
   and what the texts of a batch begin with in common, an instruction above all, goes through it once; on a CPU once
   for all batches that begin with it;
4. on a CPU with several threads, a narrow model computes several batches at once, one thread each: its products are too
   small to share between threads, except where matrix units leave little but the interpreter's lock to wait for;
5. texts are tokenized in few calls, and threads open and resize images while the model computes;
6. results go straight into one preallocated array, in the precision and dimension that were asked for.

Memory: one window of token ids (`WINDOW` contents), a few batches in flight, and the result; images are opened a batch
at a time. Order is restored: row i of the result belongs to content i.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmembed.backbones.loading import DTYPES
from mmembed.backbones.packed import ATTENTION_KERNELS, AttentionKernel
from mmembed.backbones.shared_prefix import Prefix
from mmembed.content import ContentLike, Role, Text, lone_surrogate, to_content
from mmembed.data.collate import Chunk, plan_chunks
from mmembed.errors import ConfigError, MmembedError, nearest
from mmembed.inference.cpu import accelerate, cpu_capabilities
from mmembed.inference.devices import check_device
from mmembed.inference.lists import read_list
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.vision_cache import open_features, uncached
from mmembed.preprocess import Item, ModelInputs, Preprocessor, Row
from mmembed.quantize import (
    STORED_DTYPES,
    Precision,
    check_precision,
    decode,
    quantize,
    stored_width,
    to_array,
    to_tensor,
    truncate,
    unit_rows,
)
from mmembed.threads import NARROW, ahead, beside_each_other

if TYPE_CHECKING:
    from mmembed.media import MediaStore
    from mmembed.models.embedding_model import EmbeddingModel

logger = logging.getLogger(__name__)
Batch = tuple[list[int], Tensor, Tensor | None]  # positions in the contents, vectors, mask; on the CPU
Planned = tuple[list[int], Chunk, bool]  # positions in the contents, what goes together, whether its prefix is kept
Vectors = Any  # (N, W) numpy array or tensor; a list of (T, W) for multi-vector models
CPU_TOKENS = 2048  # padded tokens in a batch: what stays in the processor's cache (see docs/inference.md)
AMX_TOKENS = 4096  # of texts in bfloat16 where the processor has matrix units for it: less would not fill them
LEAST_TOKENS, BATCHES_A_THREAD = 1024, 4  # fewer tokens a batch where there are few texts: threads end together
TOKEN_BUDGET = 16384  # on accelerators
WINDOW = 16384  # contents tokenized together: bounds the memory for token ids, loses nothing measurable in padding
KEPT_PREFIXES = 8  # at once: of a long prefix and a large model tens of megabytes each
PASSIVE = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"  # idle threads sleep between two products
PREPARED = 2  # batches prepared ahead of a model that computes one at a time


@dataclass(frozen=True)
class _How:
    """How contents become batches: the options of `encode` that concern it, as this model takes them."""

    role: Role
    instruction: str | Sequence[str | None] | None
    token_budget: int | None
    share_prefix: bool
    packed: bool
    domain: str | None = None

    def instruction_of(self, index: int) -> str | None:
        common = self.instruction
        return common if common is None or isinstance(common, str) else common[index]


class Embedder:
    """A trained embedding model with the preprocessing it was trained with.

    Args:
        model: is put into evaluation mode.
        preprocessor: the one the model was trained with.
    """

    def __init__(self, model: EmbeddingModel, preprocessor: Preprocessor) -> None:
        self.model, self.preprocessor = model.eval(), preprocessor
        accelerate(model.backbone)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        media: MediaStore | None = None,
        trust_remote_code: bool = False,
        layers: int | None = None,
        vision_cache: str | Path = "off",
        vision_cache_gb: float = 20.0,
    ) -> Embedder:
        """Loads a checkpoint folder, a bare backbone (folder or hub name), or the packaged "mmembed-nano".

        Args:
            device: default the first CUDA device, else the CPU.
            dtype: of the weights. "auto" is bfloat16 where the device computes in it, else float32; see
                `docs/inference.md` for what that changes.
            media: opens images; give a `MediaStore(root)` to resolve and confine relative paths.
            trust_remote_code: run the python code that the backbone brings; a checkpoint cannot ask for it.
            layers: keep the first decoder layers (2-D Matryoshka) and compute nothing above them; None keeps all.
            vision_cache: keep features of images on disk, so that a picture seen before runs no vision tower: a folder,
                "auto" for mmembed's cache folder where the backbone allows it, or "off". See
                `mmembed.models.vision_cache`.
            vision_cache_gb: what all features in that folder may take.

        Raises:
            CheckpointError, ConfigError: nothing loadable there, the backbone has not so many layers, or its image
                features cannot be kept.
            CacheError: the folder cannot be used.
            MmembedError: this machine has no such device, or there is no such dtype.
        """
        model, preprocessor = load_merged(path_or_name, device, dtype, trust_remote_code)
        if model.settings.head is not None:
            raise MmembedError(f"'{path_or_name}' is a reranker: it scores pairs; load it with Reranker")
        if layers is not None:
            trained = (*model.settings.layers, model.depth)
            model.cut(layers)
            if layers not in trained:
                logger.warning(
                    "%s: layer %d was not trained to embed, only %s; its vectors may be poor",
                    *(path_or_name, layers, ", ".join(map(str, trained))),
                )
        if media is not None:
            preprocessor.media = media
        if vision_cache != "off":
            reason = uncached(model, training=False)
            if reason is None:
                preprocessor.features = open_features(model, preprocessor, vision_cache, int(vision_cache_gb * 1e9), "")
            elif vision_cache != "auto":
                raise ConfigError(f"vision_cache: features of images cannot be kept ({reason}); leave it out")
        return cls(model, preprocessor)

    @property
    def embedding_size(self) -> int:
        """Dimensions of a vector before truncation."""
        return self.model.embedding_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self, folder: str | Path) -> None:
        """Writes a self-describing checkpoint, with the vectors that this model gives of fixed inputs.

        It is not read again here, as training does it: that takes a second model in memory beside this one, which a
        device that serves need not have. `mmembed verify FOLDER` compares the folder with those vectors, anywhere.

        Raises:
            CheckpointError: it cannot be written; a previous one there survives.
        """
        save_checkpoint(folder, self.model, self.preprocessor)

    def encode(
        self,
        contents: Sequence[ContentLike],
        *,
        role: Role = "document",
        instruction: str | Sequence[str | None] | None = None,
        token_budget: int | None = None,
        share_prefix: Literal["auto", "off"] = "auto",
        attention_kernel: AttentionKernel = "auto",
        truncate_dim: int | None = None,
        output: Literal["numpy", "torch"] = "numpy",
        precision: Precision = "float32",
        show_progress: bool | None = None,
        domain: str | None = None,
    ) -> Vectors:
        """Vectors of any contents, in their order.

        Args:
            contents: strings, PIL images, mappings with `text`, `image`, `images`, `video`, or lists of those;
                modalities may be mixed. A mapping may bring its own `instruction`. Or all of them rows of `prepare`.
            role: "query" or "document": the prompt style decides what it means.
            instruction: one for all contents, or one a content; a content that brings its own keeps it.
            token_budget: padded tokens in a batch, visual tokens included; a longer content is a batch of its own.
                None: 2048 on a CPU (4096 for texts in bfloat16 with AMX; fewer, 1024 at least, where that gives each
                thread four batches), 16384 on an accelerator.
            share_prefix: "auto" computes tokens that contents of a batch begin with (an instruction) once, where the
                backbone allows it (see `EmbeddingModel.unshared`); "off" for each content. The same vectors.
            attention_kernel: "packed" computes texts without padding, "padded" with it; the same vectors. "auto" packs
                where torch has a kernel for it (CUDA, bfloat16 or float16) and the backbone is known to allow it.
            truncate_dim: keep the first dimensions (Matryoshka), normalised again where the model normalises.
            output: "numpy" or "torch" (on the CPU).
            precision: "float32", "float16", "bfloat16", "int8" or "binary"; see `mmembed.quantize`.
            show_progress: None shows a bar in a terminal.
            domain: one that the routers of this mixture of experts were trained with; None: they know of none.

        Returns:
            (N, E) array, E = `truncate_dim` or `embedding_size` (an eighth of it for binary). Of a multi-vector model a
            list of N arrays (T, E), one vector a pooled token. Vectors have unit length where the model normalises.

        Raises:
            MmembedError: an option is unknown, or a content cannot be embedded; the message begins with its index.
        """
        _check_contents(contents, instruction)
        _check_options(role=role, output=output, share_prefix=share_prefix, attention_kernel=attention_kernel)
        if domain is not None and domain not in self.model.settings.domains:
            known = self.model.settings.domains
            hint = nearest(domain, known) if known else "this embedder was trained without any, leave it out"
            raise MmembedError(f"domain: there is no '{domain}'; {hint}")
        share = share_prefix == "auto" and self.model.unshared() is None
        packed = self.model.unpacked(attention_kernel, self.device, self.model.dtype) is None
        if token_budget is not None and token_budget < 1:
            raise MmembedError(f"token_budget: {token_budget}; give at least 1, typically 2048 to 32768")
        how = _How(role, instruction, token_budget, share, packed, domain)
        multi_vector, normalize = self.model.pooling.multi_vector, self.model.normalize
        precision = check_precision(precision)
        store = _Store(len(contents), self.embedding_size, truncate_dim, precision, normalize, multi_vector)
        with _progress(len(contents), show_progress) as bar:
            for positions, vectors, mask in self._batches(contents, how):
                store.put(positions, vectors, mask)
                bar.update(len(positions))
        return store.result(output)

    def prepare(
        self,
        contents: Sequence[ContentLike],
        *,
        role: Role = "document",
        instruction: str | Sequence[str | None] | None = None,
    ) -> list[Row]:
        """Contents tokenized, for `encode` to take in their place, which then reads no `role` or `instruction`.

        A server counts tokens by it, and refuses what is wrong, before it queues anything. Images are read up to their
        header. Another thread may encode meanwhile, but none prepare.

        Raises:
            MmembedError: as `encode`, but for damage that only decoding an image shows.
        """
        _check_contents(contents, instruction)
        _check_options(role=role)
        how, rows = _How(role, instruction, None, share_prefix=False, packed=False), list[Row]()
        while len(rows) < len(contents):
            rows += self._tokenize(self._window(contents, len(rows), how), len(rows))
        return rows

    def check(self, content: ContentLike, *, role: Role = "document") -> None:
        """Raises MmembedError when a content could not be encoded: reads and opens it, but runs no model."""
        self.preprocessor.collate(self.preprocessor.tokenize([item_of(content, role, None)]))

    def similarity(self, a: Vectors, b: Vectors, *, truncate_dim: int | None = None) -> np.ndarray:
        """Cosine similarities (A, B) float32 of encoded contents, in any precision.

        For multi-vector contents: MaxSim, the sum over the vectors of `a` of the best cosine in `b` (ColBERT).

        Args:
            truncate_dim: as given to `encode`; only binary vectors need it, which do not show their dimensions.

        Raises:
            MmembedError: `a` and `b` differ in their dimensions.
        """
        dim = truncate_dim or self.embedding_size
        if self.model.pooling.multi_vector:
            left, right = [_unit(one, dim) for one in a], [_unit(one, dim) for one in b]
            _check_widths([*left, *right])
            return np.array([[(x @ y.T).max(axis=1).sum() for y in right] for x in left], dtype=np.float32)
        queries, documents = _unit(a, dim), _unit(b, dim)
        _check_widths([queries, documents])
        similarities: np.ndarray = queries @ documents.T
        return similarities

    # Batches --------------------------------------------------------------------------------------------------------

    def _default_budget(self, rows: Sequence[Row]) -> int:
        if self.device.type != "cpu":
            return TOKEN_BUDGET
        images = any(any(row.media) for row in rows)
        budget = AMX_TOKENS if self._units and not images else CPU_TOKENS
        tokens = sum(map(len, rows))
        if self._apart(images, min(budget, tokens // 2)):
            share = tokens // (BATCHES_A_THREAD * torch.get_num_threads())
            budget = min(budget, max(LEAST_TOKENS, share))
        return budget

    @property
    def _units(self) -> bool:
        """Whether products go to matrix units of the CPU."""
        return self.model.dtype == torch.bfloat16 and bool(cpu_capabilities().get("amx_bf16"))

    def _apart(self, images: bool, tokens: int) -> bool:
        """Whether threads compute a batch each, of so many tokens.

        The layers of texts on matrix units (`mmembed.inference.decoder`) are short, and two threads that run them wait
        for the interpreter's lock; products of a full batch that they share take 8 % less time where idle threads spin
        (docs/log.md).
        """
        if torch.get_num_threads() == 1 or self.device.type != "cpu" or self.model.one_at_a_time:
            return False
        narrow = self.model.backbone.config.get_text_config().hidden_size <= NARROW
        full = self._units and not images and tokens > AMX_TOKENS // 2
        return narrow and (PASSIVE or not full)

    def _batches(self, contents: Sequence[ContentLike], how: _How) -> Iterator[Batch]:
        """The vectors of each batch, wherever they were computed."""
        plan, prefixes = self._plan(contents, how), _Prefixes(self.model)
        head = list(islice(plan, torch.get_num_threads()))  # as many batches as could be computed at once
        batches = chain(head, plan)
        if len(head) > 1 and self._apart(*_of_first(head)):
            yield from beside_each_other(
                batches, lambda one: self._compute(*self._prepare(*one), prefixes, how), len(head)
            )
        else:  # batch after batch through the model, while threads prepare the next ones
            for prepared in ahead(batches, lambda one: self._prepare(*one), threads=PREPARED):
                yield self._compute(*prepared, prefixes, how)

    def _prepare(self, positions: list[int], chunk: Chunk, kept: bool) -> tuple[list[int], ModelInputs, bool]:
        return positions, self._collate(positions, chunk), kept

    @torch.inference_mode()
    def _compute(self, positions: list[int], inputs: ModelInputs, kept: bool, prefixes: _Prefixes, how: _How) -> Batch:
        if inputs.tail is not None:
            shares = read_list(self.model, inputs.to(self.device), how.token_budget).shares  # (N,)
            return positions, shares.unsqueeze(1).cpu(), None
        if kept:
            inputs = replace(inputs, prefix=prefixes.of(inputs.tensors["input_ids"][0, : inputs.shared], inputs.domain))
        vectors, mask, *_ = self.model(inputs.to(self.device))  # (B, E), or (B, T, E) with (B, T)
        return positions, vectors.cpu(), None if mask is None else mask.cpu()

    def _plan(self, contents: Sequence[ContentLike], how: _How) -> Iterator[Planned]:
        """The rows of each batch, window after window; longest first, so that memory trouble shows at once."""
        start = 0
        while start < len(contents):
            rows = _prepared(contents, start) or self._tokenize(self._window(contents, start, how), start)
            shareable = [self.preprocessor.shareable(row) for row in rows] if how.share_prefix else None
            budget = how.token_budget or self._default_budget(rows)
            chunks = plan_chunks(rows, budget, shareable=shareable, packed=how.packed)
            uses = Counter(_prefix(chunk) for chunk in chunks)
            for chunk in _prefix_by_prefix(chunks):
                alone = chunk.rows[0].tail is not None  # a list runs with its own
                kept = self.device.type == "cpu" and chunk.shared > 0 and uses[_prefix(chunk)] > 1 and not alone
                yield [start + index for index in chunk.index.tolist()], chunk, kept
            start += len(rows)

    def _window(self, contents: Sequence[ContentLike], start: int, how: _How) -> list[Item]:
        """The contents that are tokenized together, from `start` on."""
        items: list[Item] = []
        for index in range(start, len(contents)):
            with naming(index):
                given = contents[index]
                pair = isinstance(given, Item)  # of a reranker
                item = given if pair else item_of(given, how.role, how.instruction_of(index), how.domain)
            if len(items) >= WINDOW and (item.place is None or item.place.number == 1):  # a list stays whole
                break
            items.append(item)
        return items

    def _tokenize(self, items: Sequence[Item], start: int) -> list[Row]:
        try:
            return self.preprocessor.tokenize(items)
        except MmembedError:
            for index, item in enumerate(items):
                with naming(start + index):
                    self.preprocessor.tokenize([item])
            raise

    def _collate(self, positions: Sequence[int], chunk: Chunk) -> ModelInputs:
        try:
            return self.preprocessor.collate(chunk.rows, shared=chunk.shared, packed=chunk.packed)
        except MmembedError:
            for position, row in zip(positions, chunk.rows, strict=True):
                with naming(position):
                    self.preprocessor.collate([row])
            raise


def load_merged(
    path_or_name: str | Path, device: str | torch.device | None, dtype: str | torch.dtype, trust_remote_code: bool
) -> tuple[EmbeddingModel, Preprocessor]:
    """Model and preprocessor for inference. Arguments and errors as of `Embedder.from_pretrained`."""
    check_device(None if device is None else str(device))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, preprocessor = load_checkpoint(
        path_or_name, resolve_dtype(dtype, device), device, trust_remote_code=trust_remote_code
    )
    model.merge_adapter()  # apart, LoRA takes 1.4 times as long in float32, 2.1 times in bfloat16 (nano)
    return model, preprocessor


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" -> bfloat16 where `device` has instructions for it, else float32; names and dtypes as they are."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        cpu = cpu_capabilities()
        fast = device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise MmembedError(f"dtype: there is no '{dtype}'; {nearest(dtype, [*DTYPES, 'auto'])}")
    return DTYPES[dtype]


class _Prefixes:
    """What batches of one call begin with, each computed once, by the first batch that needs it.

    Alone, so that its numbers do not depend on which batch of which thread that was.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model, self._known = model, dict[tuple[int, ...], Prefix]()
        self._lock = Lock()

    def of(self, ids: Tensor, domain: str | None) -> Prefix:
        """ids (P,), on the CPU; one call has one domain."""
        name = tuple(ids.tolist())
        with self._lock:
            if name not in self._known:
                if len(self._known) >= KEPT_PREFIXES:
                    del self._known[next(iter(self._known))]
                self._known[name] = self._model.read_prefix(ids, domain)
            return self._known[name]


def _prepared(contents: Sequence[Any], start: int) -> Sequence[Row]:
    """Of a list of rows all from `start` on, of other contents nothing."""
    return contents[start:] if isinstance(contents, list) and isinstance(contents[start], Row) else ()


def _of_first(planned: Sequence[Planned]) -> tuple[bool, int]:
    """Whether batches hold media, and the tokens of the first."""
    rows = planned[0][1].rows
    return any(any(row.media) for _, chunk, _ in planned for row in chunk.rows), sum(map(len, rows))


def _prefix(chunk: Chunk) -> tuple[int, ...]:
    return tuple(chunk.rows[0].ids[: chunk.shared])


def _prefix_by_prefix(chunks: Sequence[Chunk]) -> list[Chunk]:
    """In their order, but those that begin alike one behind the other: few prefixes are kept at once."""
    first: dict[tuple[int, ...], int] = {}
    order = [
        first.setdefault(_prefix(chunk), number) if chunk.shared else number for number, chunk in enumerate(chunks)
    ]
    return [chunks[number] for number in sorted(range(len(chunks)), key=lambda number: order[number])]


class _Store:
    """Receives batches of vectors in any order, converts them, and holds the result in its final form."""

    def __init__(
        self, count: int, size: int, truncate_dim: int | None, precision: Precision, normalize: bool, multi_vector: bool
    ) -> None:
        if truncate_dim is not None and not 1 <= truncate_dim <= size:
            raise MmembedError(f"truncate_dim: {truncate_dim} dimensions of vectors that have {size}; give 1 to {size}")
        self.dim, self.precision, self.normalize = truncate_dim or size, precision, normalize
        self.lists: list[np.ndarray] | None = [np.empty(0)] * count if multi_vector else None
        width = stored_width(self.dim, precision)
        self.array = np.empty((0 if multi_vector else count, width), dtype=STORED_DTYPES[precision])  # (N, W)

    def put(self, positions: Sequence[int], vectors: Tensor, mask: Tensor | None) -> None:
        stored = quantize(truncate(vectors.numpy(), self.dim, self.normalize), self.precision)  # (B, W) or (B, T, W)
        if self.lists is None:
            self.array[positions] = stored
            return
        assert mask is not None, "a multi-vector model gives a mask"
        for position, row, kept in zip(positions, stored, mask.numpy(), strict=True):
            self.lists[position] = row[kept]  # (T, W)

    def result(self, output: str) -> Vectors:
        if self.lists is not None:
            return self.lists if output == "numpy" else [to_tensor(one) for one in self.lists]
        return self.array if output == "numpy" else to_tensor(self.array)


@runtime_checkable
class _Indexed(Protocol):
    """A list, an array, a column of a table; no generator, no set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class naming:
    """Puts the index of the content before the message of an error that passes through."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MmembedError):
            error.args = (f"contents[{self.index}]: {error}",)


def _check_contents(contents: Any, instruction: str | Sequence[str | None] | None) -> None:
    if isinstance(contents, str | bytes | Mapping):
        raise MmembedError(f"contents: a single {type(contents).__name__}; give a list, encode([content])")
    if not isinstance(contents, _Indexed):
        raise MmembedError(
            f"contents: a {type(contents).__name__}, read by no index; give a list, encode(list(contents))"
        )
    if not (instruction is None or isinstance(instruction, str)) and len(instruction) != len(contents):
        raise MmembedError(f"instruction: {len(instruction)} instructions for {len(contents)} contents; give one each")


def _check_options(**given: str) -> None:
    known = {
        "role": ("query", "document"),
        "output": ("numpy", "torch"),
        "share_prefix": ("auto", "off"),
        "attention_kernel": ATTENTION_KERNELS,
    }
    for name, value in given.items():
        if value not in known[name]:
            raise MmembedError(f"{name}: there is no '{value}'; {nearest(value, known[name])}")


def _progress(total: int, show: bool | None) -> tqdm[Any]:
    """A bar that a short encoding does not show; None shows it in a terminal."""
    disable = None if show is None else not show
    return tqdm(total=total, desc="encode", unit=" contents", delay=1.0, disable=disable)


def item_of(value: ContentLike, role: Role, instruction: str | None, domain: str | None = None) -> Item:
    """A content under an instruction, unless it brings its own. Raises MmembedError for texts that say nothing."""
    content = to_content(value)
    if any(isinstance(part, Text) and not part.text.strip() for part in content):  # as of records
        raise MmembedError("an empty text has nothing to embed; leave it out, or drop the content")
    own = value.get("instruction") if isinstance(value, Mapping) else None
    asked = instruction if own is None else own
    texts = [part.text for part in content if isinstance(part, Text)]
    for text in texts if asked is None else [*texts, asked]:
        lone = lone_surrogate(text)
        if lone is not None:
            raise MmembedError(f"a text that is not valid Unicode (a lone surrogate, {lone}); correct it")
    return Item(content, role, asked, domain=domain)


def _check_widths(vectors: Sequence[np.ndarray]) -> None:
    widths = sorted({one.shape[-1] for one in vectors})
    if len(widths) > 1:
        found = " and ".join(map(str, widths))
        raise MmembedError(f"similarity: vectors of {found} dimensions; encode all of them with the same truncate_dim")


def _unit(vectors: Vectors, dim: int) -> np.ndarray:
    """Encoded vectors of any precision -> (N, E) float32 rows of unit length. `dim`: of binary vectors."""
    stored = to_array(vectors)
    if stored.dtype == np.uint8 and stored.shape[-1] != stored_width(dim, "binary"):
        raise MmembedError(
            f"similarity: binary vectors of {stored.shape[-1]} bytes do not have {dim} dimensions; "
            "give the truncate_dim that they were encoded with"
        )
    return unit_rows(decode(stored, dim))
