"""Batches as a pure function of (seed, step): nothing to save for an exact resume.

Texts are drawn from buckets of similar length, so almost no position is padding. Pictures are stored once, resized, as
one flat uint8 file, and changed a little at each visit, because a few thousand pictures are soon known by heart.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from recipes.nano import data
from recipes.nano.model import MAX_VISUAL_TOKENS, MERGE, MIN_VISUAL_TOKENS, PATCH, TOKEN_PIXELS, token_id

MAX_TEXT_TOKENS = 256
MAX_CAPTION_TOKENS = 40
BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, MAX_TEXT_TOKENS)
FOREIGN_WEIGHT = 0.35
SOURCE_WEIGHT = {
    "noto-emoji": 0.5,
    "story-pages": 2.0,
    "tech-figures": 3.0,
    "vega-charts": 3.0,
    "openstax-figures": 2.0,
}
PREFIXES = (
    "Instruct: Given a question, retrieve passages that answer it.\nQuery: ",
    "Instruct: Represent the text.\nQuery: ",
    "Instruct: Find the picture that fits the description.\nQuery: ",
    "Instruct: Retrieve the code that does this.\nQuery: ",
    "Represent the document: ",
)
PREFIX_SHARE = 0.25
MIRRORED = ("noto-emoji", "story-pages", "openstax-figures", "clothing", "recipes")


@dataclass(frozen=True)
class TextBatch:
    ids: torch.Tensor  # (B, T): [prefix] content end-of-text padding
    start: int  # first content position
    ends: torch.Tensor  # (B,) position of the end-of-text token
    teacher: torch.Tensor  # (B, D) teacher vectors, zero where unknown
    known: torch.Tensor  # (B,) bool

    def content(self) -> torch.Tensor:
        """(B, T) True on content tokens."""
        positions = torch.arange(self.ids.shape[1])
        return (positions >= self.start) & (positions < self.ends.unsqueeze(1))

    def predicting(self) -> torch.Tensor:
        """(B, T - 1) True where the next token is content or end of text."""
        positions = torch.arange(self.ids.shape[1] - 1)
        return (positions >= max(self.start - 1, 0)) & (positions < self.ends.unsqueeze(1))


@dataclass(frozen=True)
class PictureBatch:
    inputs: dict[str, torch.Tensor]  # of the model: ids (B, T) = picture then caption
    picture: torch.Tensor  # (B, T) True on the picture's positions
    caption: torch.Tensor  # (B, T - 1) True where the next token is caption or end of text
    targets: torch.Tensor  # (B,) row of `bank` that belongs to the picture
    bank: torch.Tensor  # (N, D) teacher vectors of all captions of the source
    ignored: torch.Tensor  # (B, N) True at the picture's other captions


class TextData:
    """All train texts, tokenized into one flat array."""

    def __init__(
        self, texts: list[data.Text], tokenizer: PreTrainedTokenizerFast, vectors: torch.Tensor, rows: dict[str, int]
    ):
        encoded = tokenizer([t.text for t in texts], truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        self.flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.vectors, self.eos, self.pad = vectors, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.teacher_row = np.array([rows.get(t.teacher, -1) for t in texts])
        self.prefixes = [tokenizer(p)["input_ids"] for p in PREFIXES]
        self.vocabulary = len(tokenizer)
        weights = np.array(
            [(1.0 if t.language == "en" else FOREIGN_WEIGHT) * SOURCE_WEIGHT.get(t.source, 1.0) for t in texts]
        )
        bucket = np.searchsorted(BUCKETS, lengths)
        self.members = [np.flatnonzero((bucket == b) & (lengths > 0)) for b in range(len(BUCKETS))]
        self.cumulative = [np.cumsum(weights[m]) for m in self.members]
        mass = np.array([(weights[m] * lengths[m]).sum() for m in self.members])
        self.bucket_mass = mass / mass.sum()

    def token_counts(self) -> np.ndarray:
        return np.bincount(self.flat, minlength=self.vocabulary) + 1.0

    def batch(self, seed: int, step: int, tokens: int) -> TextBatch:
        random = np.random.default_rng([seed, step, 1])
        bucket = random.choice(len(BUCKETS), p=self.bucket_mass)
        size = max(8, tokens // (BUCKETS[bucket] + 1))
        draws = random.random(size) * self.cumulative[bucket][-1]
        rows = self.members[bucket][np.unique(np.searchsorted(self.cumulative[bucket], draws))]
        prefix = self.prefixes[random.integers(len(self.prefixes))] if random.random() < PREFIX_SHARE else []
        sequences = [self.flat[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        return self.pack(sequences, self.teacher_row[rows], prefix)

    def pack(self, sequences: list[np.ndarray], teacher_rows: np.ndarray, prefix: list[int]) -> TextBatch:
        ends = torch.tensor([len(prefix) + len(s) for s in sequences])
        ids = torch.full((len(sequences), int(ends.max()) + 1), self.pad)
        for row, sequence in enumerate(sequences):
            ids[row, : ends[row] + 1] = torch.tensor([*prefix, *sequence.tolist(), self.eos])
        known = torch.from_numpy(teacher_rows >= 0)
        teacher = self.vectors[torch.from_numpy(teacher_rows.clip(0))] * known.unsqueeze(1)
        return TextBatch(ids, len(prefix), ends, teacher, known)


class PictureData:
    def __init__(
        self,
        root: Path,
        cache: Path,
        pictures: list[data.Picture],
        tokenizer: PreTrainedTokenizerFast,
        processor: Qwen3VLProcessor,
        vectors: torch.Tensor,
        rows: dict[str, int],
    ):
        self.tokenizer, self.processor, self.vectors = tokenizer, processor, vectors
        self.pixels, self.index = cached_pixels(root, cache, sorted({p.source for p in pictures}))
        self.members: dict[str, list[data.Picture]] = {}
        self.banks: dict[str, tuple[torch.Tensor, dict[int, int]]] = {}
        for source in sorted({p.source for p in pictures}):
            own = [p for p in pictures if p.source == source and any(c.teacher for c in p.captions)]
            self.members[source] = own
            bank = sorted({rows[c.teacher] for p in own for c in p.captions if c.teacher in rows})
            self.banks[source] = (torch.tensor(bank), {row: i for i, row in enumerate(bank)})
        self.rows = rows
        size = np.array([len(m) for m in self.members.values()]) ** 0.7
        self.share = size / size.sum()

    def batch(self, seed: int, step: int, size: int) -> PictureBatch:
        random = np.random.default_rng([seed, step, 3])
        source = list(self.members)[random.choice(len(self.members), p=self.share)]
        own = self.members[source]
        pictures = [own[i] for i in random.choice(len(own), size=min(size, len(own)), replace=False)]
        bank, place = self.banks[source]
        captions = [_choose(p.captions, random) for p in pictures]
        targets = torch.tensor([place[self.rows[c.teacher]] for c in captions])
        ignored = torch.zeros(len(pictures), len(bank), dtype=torch.bool)
        for row, picture in enumerate(pictures):
            ignored[row, [place[self.rows[c.teacher]] for c in picture.captions if c.teacher in self.rows]] = True
            ignored[row, targets[row]] = False
        images = [change(self.image(source, p.image_id), random, source in MIRRORED) for p in pictures]
        inputs, picture, caption = self.pack(images, [c.text for c in captions])
        return PictureBatch(inputs, picture, caption, targets, self.vectors[bank], ignored)

    def image(self, source: str, image_id: str) -> torch.Tensor:
        offset, height, width = self.index[f"{source}/{image_id}"]
        flat = np.array(self.pixels[offset : offset + 3 * height * width])
        return torch.from_numpy(flat.reshape(3, height, width))

    def pack(
        self, images: list[torch.Tensor], captions: list[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        vision = self.processor.image_processor(images=images, do_resize=False, return_tensors="pt")
        grid = vision["image_grid_thw"]
        counts = (grid.prod(-1) // MERGE**2).tolist()
        begin, pad, end = (
            token_id(self.tokenizer, token) for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        )
        texts = self.tokenizer(captions, truncation=True, max_length=MAX_CAPTION_TOKENS)["input_ids"]
        sequences = [
            [begin, *[pad] * n, end, *text, self.tokenizer.eos_token_id] for n, text in zip(counts, texts, strict=True)
        ]
        ids = torch.full((len(sequences), max(map(len, sequences))), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        positions = torch.arange(ids.shape[1])
        border = torch.tensor(counts).unsqueeze(1) + 2  # (B, 1) first caption position
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": ids.eq(pad).long(),
            "pixel_values": vision["pixel_values"],
            "image_grid_thw": grid,
        }
        return inputs, positions < border, (positions[:-1] >= border - 1) & mask[:, 1:].bool()


def _choose(captions: Iterable[data.Text], random: np.random.Generator) -> data.Text:
    """An English caption three times in four, when there is one; only captions with a teacher."""
    taught = [c for c in captions if c.teacher]
    english = [c for c in taught if c.language == "en"]
    pool = english if english and random.random() < 0.75 else taught
    return pool[random.integers(len(pool))]


def cached_pixels(root: Path, cache: Path, sources: list[str]) -> tuple[np.ndarray, dict[str, tuple[int, int, int]]]:
    """One flat uint8 file of all pictures as the processor would resize them, and where each lies."""
    store, listing = cache / "pixels.npy", cache / "pixels.json"
    if not listing.exists():
        index, parts, offset = {}, [], 0
        for source in sources:
            for image_id, picture in data.open_images(root, source):
                height, width = target_size(picture.height, picture.width)
                array = np.asarray(picture.resize((width, height), resample=3)).transpose(2, 0, 1)  # (3, H, W)
                index[f"{source}/{image_id}"] = (offset, height, width)
                parts.append(array.ravel())
                offset += array.size
        np.save(store, np.concatenate(parts))
        listing.write_text(json.dumps(index))
    return np.load(store, mmap_mode="r"), json.loads(listing.read_text())


def target_size(height: int, width: int) -> tuple[int, int]:
    ratio = max(height, width) / min(height, width)
    if ratio > 8:  # very long pictures: the nearest shape the budget allows
        height, width = (height, int(height * 8)) if width > height else (int(width * 8), width)
    return smart_resize(
        height, width, PATCH * MERGE, MIN_VISUAL_TOKENS * TOKEN_PIXELS, MAX_VISUAL_TOKENS * TOKEN_PIXELS
    )


def change(image: torch.Tensor, random: np.random.Generator, mirrored: bool) -> torch.Tensor:
    """The picture as another might have drawn or shot it. (3, H, W) uint8

    A crop of 60-100 % a side, turned by up to 12 degrees and perhaps mirrored, on white; gain and shift of each colour;
    one picture in four loses a rectangle.
    """
    size = random.uniform(0.6, 1.0, size=2)  # height, width of the crop
    centre = random.uniform(-1, 1, size=2) * (1 - size)
    turn = random.uniform(-0.21, 0.21)
    flip = -1.0 if mirrored and random.random() < 0.5 else 1.0
    cosine, sine = np.cos(turn), np.sin(turn)
    affine = torch.tensor(
        [[size[1] * cosine * flip, -size[1] * sine, centre[1]], [size[0] * sine * flip, size[0] * cosine, centre[0]]],
        dtype=torch.float32,
    )
    grid = torch.nn.functional.affine_grid(affine[None], [1, *image.shape], align_corners=False)
    inverted = 255.0 - image[None].float()  # outside the picture is zero: white
    crop = 255.0 - torch.nn.functional.grid_sample(inverted, grid, align_corners=False)[0]
    gain = torch.tensor(random.uniform(0.7, 1.3) * random.uniform(0.9, 1.1, size=(3, 1, 1)), dtype=torch.float32)
    crop = (crop - 128) * gain + 128 + random.uniform(-25, 25)
    if random.random() < 0.25:
        height, width = (int(side * random.uniform(0.15, 0.4)) for side in image.shape[1:])
        top, left = random.integers(image.shape[1] - height + 1), random.integers(image.shape[2] - width + 1)
        crop[:, top : top + height, left : left + width] = random.uniform(0, 255)
    return crop.clamp(0, 255).to(torch.uint8)
