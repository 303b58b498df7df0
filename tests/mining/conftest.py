"""Small sources to mine in, of made-up texts and of the shipped data."""

import json
import random
from pathlib import Path

import pytest
import yaml

DATA = Path(__file__).resolve().parents[2] / "data"
WORDS = ("red", "blue", "bus", "train", "river", "bread", "engine", "letter", "forest", "tower", "bridge", "dog", "cup")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_multi_vector(backbone, folder, seed=0):
    """A model of 24 dimensions a token and patch, with a head of random weights; returns its folder."""
    import torch

    from mmembed import Embedder
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    torch.manual_seed(seed)
    settings = EmbedderSettings(str(backbone), dtype="float32", pooling={"type": "multi_vector", "dim": 24})
    Embedder(*build_from_settings(settings)).save(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    """Folder with 30 records in `train.jsonl` and 60 more documents in `corpus.jsonl`."""
    draw = random.Random(0)

    def sentence():
        return " ".join(draw.choices(WORDS, k=8))

    folder = tmp_path / "texts"
    folder.mkdir()
    records = [
        {
            "query": f"{sentence()} {row}",
            "documents": [{"content": f"{sentence()} {row} p", "id": f"p{row}"}],
            "id": f"q{row}",
        }
        for row in range(30)
    ]
    write_lines(folder / "train.jsonl", records)
    write_lines(folder / "corpus.jsonl", [{"id": f"d{row}", "text": f"{sentence()} {row}"} for row in range(60)])
    return folder


@pytest.fixture
def mining(tmp_path, texts):
    """mining(retriever=..., ...) -> a config file of those texts, found by BM25 unless told otherwise."""

    def write(**changes):
        tree = {
            "output": str(tmp_path / "out"),
            "root": str(texts),
            "sources": [{"path": "train.jsonl", "corpus": ["corpus.jsonl"]}],
            "retriever": "bm25",
            "search": {"depth": 10},
            "rules": ["top_k"],
            "negatives": 3,
        }
        file = tmp_path / "mining.yaml"
        file.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")
        return file

    return write
