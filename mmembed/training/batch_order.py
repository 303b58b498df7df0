"""Which pairs stay together in batches: `data.batch_order`, hard in-batch negatives without mined ones.

A rule of mining (`similar`, `b3`, `saha`) groups the pairs of a source by vectors of its queries and first positives,
and the batch plan deals whole groups. The vectors are those of the model that training starts from, or of `model`. They
are computed once, before the first step; the groups (4 bytes a pair) lie in the cache under a fingerprint of records,
rule, seed and embedder, and in each checkpoint, so that a resumed run has them whatever became of the cache.

Cost: a forward pass of each query and distinct positive, their search, and the vectors in memory until then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmembed.config.blocks import EmbedderConfig, block_options, block_type
from mmembed.data.batch_plan import linked_rows
from mmembed.data.dataset import RecordDataset
from mmembed.data.streaming import Source
from mmembed.errors import CheckpointError, ConfigError
from mmembed.media import build_once, default_cache_dir
from mmembed.mining import MINERS, Candidates, Miner
from mmembed.mining.retrieval import retrieve
from mmembed.models.folder import read_tensors
from mmembed.preprocess import Item
from mmembed.training.data_vectors import Encoder, agreed, check_embedder, encode_all

logger = logging.getLogger(__name__)
FILE, GROUPS = "batch_order.safetensors", "groups.npy"
Groups = NDArray[np.int32]


def order_rule(config: EmbedderConfig) -> Miner | None:
    """The rule that `data.batch_order` names.

    Raises:
        ConfigError: there is no such rule, it takes no such option, or it groups no pairs.
    """
    block = config.data.batch_order
    if block is None:
        return None
    options = {key: value for key, value in block_options(block).items() if key != "model"}
    rule = MINERS.build({"type": block_type(block), **options})
    if rule.role != "cluster":
        known = ", ".join(name for name, one in MINERS.classes().items() if one.role == "cluster")
        raise ConfigError(f"data.batch_order: '{rule.name}' chooses negatives and groups no pairs; take one of {known}")
    return rule


def order_model(config: EmbedderConfig) -> str | None:
    """The embedder that says which pairs are similar; None: the one that training starts from."""
    block = config.data.batch_order
    return None if block is None else block_options(block).get("model")


def check_order(config: EmbedderConfig) -> None:
    """Raises ConfigError for a rule or options that there are not, and where `model` is no embedder."""
    rule, model = order_rule(config), order_model(config)
    if model is None:
        return
    assert rule is not None, "it has the model"
    if not isinstance(model, str):
        raise ConfigError(f"data.batch_order.model: found {model!r}; give a saved embedder, or a backbone")
    check_embedder("data.batch_order.model", model)


def group_sources(
    config: EmbedderConfig, sources: Sequence[Source], graded: frozenset[str], seed: int, encoder: Encoder
) -> list[Groups | None]:
    """The group of each row of each source; None of one whose pairs do not meet. All processes have to call it."""
    rule = order_rule(config)
    assert rule is not None, "asked for where there is one"
    return [
        _of_source(source, rule, seed, encoder)
        if isinstance(source, RecordDataset) and source.source.in_batch_negatives and source.name not in graded
        else None
        for source in sources
    ]


def describe(config: EmbedderConfig, sources: Sequence[Source], groups: Sequence[Groups | None]) -> list[str]:
    """Lines for the batch report."""
    assert config.data.batch_order is not None, "asked for where there is one"
    lines, name, model = [], block_type(config.data.batch_order), order_model(config) or "the model as it is now"
    for source, of in zip(sources, groups, strict=True):
        if of is not None:
            sizes = np.bincount(of[of >= 0])
            lines.append(
                f"batch order of {source.name}: {name} by {model}, {len(sizes):,} groups of "
                f"{sizes.max(initial=0)} pairs at most, {int((of < 0).sum()):,} pairs in none"
            )
    return lines


def save_groups(folder: Path, groups: Sequence[Groups | None]) -> None:
    """Writes them beside a checkpoint."""
    from safetensors.torch import save_file

    save_file({str(number): torch.from_numpy(of) for number, of in enumerate(groups) if of is not None}, folder / FILE)


def load_groups(folder: Path, groups: Sequence[Groups | None]) -> list[Groups | None]:
    """What `save_groups` wrote, in place of those given.

    Raises:
        CheckpointError: it is missing, broken, or of other sources.
    """
    if not (folder / FILE).exists():
        raise CheckpointError(f"{folder}: holds no {FILE}, so it is of a run without data.batch_order; remove the key")
    saved = read_tensors(folder / FILE)
    found = [saved[str(number)].numpy() if str(number) in saved else None for number in range(len(groups))]
    for number, (before, now) in enumerate(zip(found, groups, strict=True)):
        if (None if before is None else len(before)) != (None if now is None else len(now)):
            raise CheckpointError(f"{folder / FILE}: the groups of source {number} are of other records")
    return found


def _of_source(source: RecordDataset, rule: Miner, seed: int, encoder: Encoder) -> Groups:
    code = Path(str(sys.modules[type(rule).__module__].__file__)).read_bytes()
    described = json.dumps([source.fingerprint, rule.name, vars(rule), seed, encoder.identity], sort_keys=True)
    folder = default_cache_dir() / "batch-order" / hashlib.sha256(described.encode() + code).hexdigest()[:24]
    if not agreed(lambda: (folder / "complete.json").exists()):
        _, firsts, of_row = np.unique(source.keys()[:, 1], return_index=True, return_inverse=True)

        def query(number: int) -> tuple[Item, str]:
            example = source[number]
            return Item.of_query(example), example.where

        def positive(number: int) -> tuple[Item, str]:
            example = source[int(firsts[number])]
            document = max(example.documents, key=lambda one: one.relevance)
            return Item.of_document(document, source.source.document_instruction, source.source.domain), example.where

        queries = encode_all(encoder, len(source), query, f"queries of {source.name}")
        positives = encode_all(encoder, len(firsts), positive, f"positives of {source.name}")

        def build(work: Path) -> dict[str, int]:
            depth = min(rule.depth, len(positives))
            found: Candidates = retrieve(queries, positives, of_row[:, None], depth, spare=False)
            groups = rule.groups(found, queries, linked_rows(source.keys()).astype(np.int64), seed)
            np.save(work / GROUPS, groups.astype(np.int32))
            return {"rows": len(groups)}

        agreed(lambda: build_once(folder, build))
    groups: Groups = agreed(lambda: np.load(folder / GROUPS))
    return groups
