"""Vectors of the training data, by the model in training or by another embedder, for what is decided by them.

All processes share the chunks of a window and hold the result, so that what follows from it is the same everywhere;
what only one of them should do, `agreed` does. Cost: a forward pass of each input, and (N, E) floats in memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional
from tqdm.auto import tqdm

from mmembed.backbones import resolve_backbone
from mmembed.data.collate import Chunk
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.checkpoint import load_checkpoint
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.folder import SETTINGS
from mmembed.models.probes import vectors_of
from mmembed.objectives.aligned import mean_vector
from mmembed.objectives.gather import world
from mmembed.preprocess import Item, Preprocessor
from mmembed.training.evaluation import embed_items

WINDOW = 8192  # inputs that are tokenized together
POLL = 0.5  # seconds
Found = TypeVar("Found")
ItemAt = Callable[[int], tuple[Item, str]]  # number -> input, and `file:line` of its record


@dataclass(frozen=True)
class Encoder:
    """What encodes.

    encode: a chunk -> its embeddings, in evaluation mode.
    preprocessor: chunks are made with it. token_budget: padded tokens a chunk.
    identity: another one for other weights, prompts or lengths.
    """

    encode: Callable[[Chunk], Embeddings]
    preprocessor: Preprocessor
    token_budget: int
    identity: str


@torch.no_grad()
def encode_all(encoder: Encoder, count: int, item_at: ItemAt, what: str) -> NDArray[np.float32]:
    """(count, E) unit vectors; of several vectors an input, their mean. All processes have to call it.

    Args:
        what: is encoded, for the progress bar.
    """
    parts = []
    with tqdm(total=count, desc=f"encoding {what}", unit=" inputs", delay=3, disable=world()[0] > 0) as progress:
        for start in range(0, count, WINDOW):
            found = [item_at(number) for number in range(start, min(count, start + WINDOW))]
            items, where = zip(*found, strict=True)
            embedded = embed_items(items, where, encoder.encode, encoder.preprocessor, encoder.token_budget)
            parts.append(functional.normalize(mean_vector(embedded).vectors.float(), dim=-1).numpy())
            progress.update(len(items))
    return np.concatenate(parts)


def identity_of(model: EmbeddingModel, preprocessor: Preprocessor) -> str:
    """A digest of a model's settings and of the vectors that it gives of fixed inputs."""
    settings = json.dumps(asdict(model.settings), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode() + vectors_of(model, preprocessor).float().numpy().tobytes()).hexdigest()


def check_embedder(key: str, name: str) -> None:
    """Raises ConfigError where the folder that `key` names holds no embedder."""
    folder = Path(resolve_backbone(name))
    if folder.is_dir() and not any((folder / one).exists() for one in (SETTINGS, "config.json")):
        raise ConfigError(f"{key}: {name} holds no embedder; give a saved embedder, or a backbone")


def check_device(key: str, name: str) -> None:
    """Raises ConfigError where there is no device as `key` names it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key}: there is no '{name}'; write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key}: '{name}', of {torch.cuda.device_count()} CUDA devices here; take cpu")


def other_embedder(
    name: str, device: torch.device, media: MediaStore, token_budget: int, half: torch.dtype | None
) -> Encoder:
    """A saved embedder, or a bare backbone.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    model, preprocessor = load_checkpoint(name, device=device, media=media)
    return encoder_of(model, preprocessor, device, token_budget, half)


def encoder_of(
    model: EmbeddingModel, preprocessor: Preprocessor, device: torch.device, token_budget: int, half: torch.dtype | None
) -> Encoder:
    """What encodes with a model in evaluation mode.

    Args:
        half: precision that products are computed in; None: that of the weights.
    """

    def encode(chunk: Chunk) -> Embeddings:
        with torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None):
            embeddings: Embeddings = model(chunk.inputs(preprocessor).to(device))
        return Embeddings(embeddings.vectors, embeddings.mask)

    return Encoder(encode, preprocessor, token_budget, identity_of(model, preprocessor))


def agreed(compute: Callable[[], Found]) -> Found:
    """What the first process computes, in all of them; its MmembedError, too."""
    if world()[1] == 1:
        return compute()
    answer: list[Found | MmembedError | None] = [None, None]
    if world()[0] == 0:
        try:
            answer[0] = compute()
        except MmembedError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[1], MmembedError):
        raise answer[1]
    return answer[0]  # type: ignore[return-value]  # of the type that `compute` gives


def agreed_later(compute: Callable[[], Found]) -> Found:
    """As `agreed`, of what takes minutes or hours: the others ask every `POLL` seconds whether it is there, so no wait
    of theirs comes near `ddp_timeout`, and a lost process shows at once. It is computed in a thread."""
    if world()[1] == 1:
        return compute()
    found: Future[Found] = Future()

    def work() -> None:
        try:
            found.set_result(compute())
        except BaseException as error:
            found.set_exception(error)

    computing = threading.Thread(target=work, daemon=True)  # a process that has to end does not wait for it
    if world()[0] == 0:
        computing.start()
    running = [True]
    while running[0]:
        if world()[0] == 0:
            computing.join(POLL)
            running[0] = computing.is_alive()
        dist.broadcast_object_list(running, src=0)
    return agreed(found.result)
