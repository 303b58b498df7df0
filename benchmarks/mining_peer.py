"""A process that mines with sentence-transformers: the peer of row `command` of `benchmarks.mining`.

    python -m benchmarks.mining_peer FOLDER OUTPUT USE_FAISS

Reads records.jsonl and corpus.jsonl of the folder, mines with the vectors that lie in its `cache`, and writes a line a
record. Importing it is what its imports cost.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mmembed.backbones.torchvision_shim  # noqa: F401  (before sentence-transformers)

import numpy as np  # isort: skip
from datasets import Dataset  # isort: skip
from sentence_transformers import SentenceTransformer, util  # isort: skip
from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # isort: skip
from tokenizers import Tokenizer, models  # isort: skip


def mined(asked: list[str], positives: list[str], texts: list[str], cache: Path, size: int, **options: Any) -> Dataset:
    """`mine_hard_negatives` with the vectors that `keep` put into the cache."""
    data = Dataset.from_dict({"anchor": asked, "positive": positives})
    return util.mine_hard_negatives(
        data, model_of(size), corpus=texts, sampling_strategy="top", output_format="n-tuple", cache_folder=str(cache),
        **options,
    )  # fmt: skip


def model_of(size: int) -> SentenceTransformer:
    """The smallest that there is: the function asks for one, and encodes nothing with it."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    modules = [StaticEmbedding(words, embedding_dim=size)]
    return SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot")


def keep(cache: Path, name: str, texts: list[str], vectors: np.ndarray) -> None:
    """Puts vectors where the function looks for those of these texts: name is "query" or "corpus"."""
    import hashlib

    cache.mkdir(exist_ok=True)
    base = model_of(vectors.shape[1]).model_card_data.base_model or ""
    key = hashlib.sha256(repr((base, None, None, texts)).encode(), usedforsecurity=False).hexdigest()
    np.save(cache / f"{name}_embeddings_{key}.npy", vectors)


def main() -> None:
    folder, output, use_faiss = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    settings = json.loads((folder / "peer.json").read_text())
    with (folder / "corpus.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    with (folder / "records.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    asked = [record["query"] for record in records]
    positives = [record["documents"][0]["content"] for record in records]
    found = mined(asked, positives, texts, folder / "cache", use_faiss=use_faiss, verbose=True, **settings)
    found.to_json(output, force_ascii=False)


if __name__ == "__main__":
    main()
