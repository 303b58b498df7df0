"""Batches as a pure function of (seed, step): nothing to save for an exact resume.

Texts are drawn from buckets of similar length, so almost no position is padding; `mixed` batches, for the stage without
blocks where padding costs nothing, from all of them. Half of the batches of passages are made of few articles, so that
the wrong paragraphs are hard to tell from the right one. Pictures are stored once, resized, as one flat uint8 file, and
changed a little at each visit, because a few thousand pictures are soon known by heart.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
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
    "mbpp": 4.0,  # the only task descriptions and short programs there are
    "odex": 4.0,
}
PREFIXES = (
    "Instruct: Given a question, retrieve passages that answer it.\nQuery: ",
    "Instruct: Represent the text.\nQuery: ",
    "Instruct: Find the picture that fits the description.\nQuery: ",
    "Instruct: Retrieve the code that does this.\nQuery: ",
    "Represent the document: ",
)
PREFIX_SHARE = 0.25
HARD_SHARE = 0.5  # of batches of pairs and passages that are drawn from few groups
MOST_OF_A_GROUP = 32
WHOLE_SHARE = 0.3  # of inverse cloze: the sentence stays in its paragraph
MIRRORED = ("noto-emoji", "story-pages", "openstax-figures", "clothing", "recipes")


@dataclass(frozen=True)
class TextBatch:
    ids: torch.Tensor  # (B, T): [prefix] content end-of-text padding
    start: int  # first content position
    ends: torch.Tensor  # (B,) position of the end-of-text token
    known: torch.Tensor  # (K,) rows that have a teacher
    teacher: torch.Tensor  # (K, D) its vectors
    predicting: torch.Tensor  # (M,) places in (B, T - 1) laid flat where the next token is content or end of text

    def content(self) -> torch.Tensor:
        """(B, T) True on content tokens."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.start) & (positions < self.ends.unsqueeze(1))


@dataclass(frozen=True)
class PairBatch:
    queries: TextBatch
    documents: TextBatch
    same: torch.Tensor  # (B, B) bool, True where another row has the same document or query


@dataclass(frozen=True)
class PictureBatch:
    inputs: dict[str, torch.Tensor]  # of the model: ids (B, T) = picture then caption
    picture: torch.Tensor  # (B, T) True on the picture's positions
    caption: torch.Tensor  # (M,) places in (B, T - 1) laid flat where the next token is caption or end of text
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
        self.taught = np.flatnonzero((self.teacher_row >= 0) & (lengths > 0))
        self.taught_cumulative = np.cumsum((weights * np.sqrt(lengths.clip(4)))[self.taught])
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

    def mixed(self, seed: int, step: int, size: int) -> TextBatch:
        """Texts with a teacher, of any length, drawn by the root of their length."""
        draws = np.random.default_rng([seed, step, 2]).random(size) * self.taught_cumulative[-1]
        rows = self.taught[np.unique(np.searchsorted(self.taught_cumulative, draws))]
        return self.pack([self.flat[self.offsets[r] : self.offsets[r + 1]] for r in rows], self.teacher_row[rows], [])

    def pack(self, sequences: list[np.ndarray], teacher_rows: np.ndarray, prefix: list[int]) -> TextBatch:
        ends = np.array([len(prefix) + len(s) for s in sequences])
        ids = np.full((len(sequences), int(ends.max()) + 1), self.pad, dtype=np.int64)
        ids[:, : len(prefix)] = prefix
        for row, sequence in enumerate(sequences):
            ids[row, len(prefix) : ends[row]] = sequence
        ids[np.arange(len(ids)), ends] = self.eos
        known = torch.from_numpy(np.flatnonzero(teacher_rows >= 0))
        teacher = self.vectors[torch.from_numpy(teacher_rows)[known]]
        positions = np.arange(ids.shape[1] - 1)
        predicting = np.flatnonzero((positions >= max(len(prefix) - 1, 0)) & (positions < ends[:, None]))
        return TextBatch(
            torch.from_numpy(ids),
            len(prefix),
            torch.from_numpy(ends),
            known,
            teacher,
            torch.from_numpy(predicting),
        )


class PairData:
    """Queries with their documents, and sentences with their paragraphs; a batch holds one source."""

    def __init__(
        self, pairs: list[data.Pair], passages: list[data.Passage], tokenizer: PreTrainedTokenizerFast, text: TextData
    ):
        self.text = text
        queries, documents = (_tokens(tokenizer, [getattr(p, side) for p in pairs]) for side in ("query", "document"))
        self.pairs = list(zip(queries, documents, strict=True))
        self.query_number = np.unique([p.query for p in pairs], return_inverse=True)[1]
        self.document_number = np.unique([f"{p.source} {p.document_id}" for p in pairs], return_inverse=True)[1]
        self.passages = [_tokens(tokenizer, list(p.sentences)) for p in passages]
        self.pair_sources = _by_source([(p.source, p.document_id) for p in pairs])
        self.passage_sources = _by_source([(p.source, p.group) for p in passages])

    def batch(self, seed: int, step: int, size: int = 10**9, tokens: int = 10**9) -> PairBatch:
        """At most `size` pairs, and at most about `tokens` tokens in their documents together."""
        random = np.random.default_rng([seed, step, 4])
        rows = _draw(self.pair_sources, size, random)
        rows = rows[: _fitting([len(self.pairs[r][1]) for r in rows], tokens)]
        return self._pack([self.pairs[r] for r in rows], self.query_number[rows], self.document_number[rows])

    def cloze(self, seed: int, step: int, size: int) -> PairBatch:
        random = np.random.default_rng([seed, step, 5])
        rows = _draw(self.passage_sources, size, random)
        drawn = []
        for sentences in (self.passages[r] for r in rows):
            asked = random.integers(len(sentences))
            kept = sentences if random.random() < WHOLE_SHARE else sentences[:asked] + sentences[asked + 1 :]
            drawn.append((sentences[asked], np.concatenate(kept)[:MAX_TEXT_TOKENS]))
        return self._pack(drawn, rows)

    def _pack(self, drawn: list[tuple[np.ndarray, np.ndarray]], *numbers: np.ndarray) -> PairBatch:
        """`numbers`: rows that agree in one of them are no negatives of each other."""
        unknown = np.full(len(drawn), -1)
        same = torch.from_numpy(np.any([n[:, None] == n for n in numbers], axis=0))
        queries, documents = (self.text.pack(list(side), unknown, []) for side in zip(*drawn, strict=True))
        return PairBatch(queries, documents, same & ~torch.eye(len(drawn), dtype=torch.bool))


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def _by_source(places: Sequence[tuple[str, str]]) -> dict[str, list[np.ndarray]]:
    """source -> row numbers of each of its groups, from the (source, group) of each row"""
    sources: dict[str, dict[str, list[int]]] = {}
    for row, (source, group) in enumerate(places):
        sources.setdefault(source, {}).setdefault(group, []).append(row)
    return {source: [np.array(rows) for rows in groups.values()] for source, groups in sources.items()}


def _draw(sources: dict[str, list[np.ndarray]], size: int, random: np.random.Generator) -> np.ndarray:
    """Rows of one source, drawn by the root of its size: of few groups, or of all."""
    names = list(sources)
    share = np.array([sum(map(len, sources[name])) for name in names]) ** 0.5
    groups = sources[names[random.choice(len(names), p=share / share.sum())]]
    if random.random() < HARD_SHARE:
        chosen = [random.permutation(groups[g])[:MOST_OF_A_GROUP] for g in random.permutation(len(groups))[:size]]
        return np.concatenate(chosen)[:size]
    return random.permutation(np.concatenate(groups))[:size]


def _fitting(lengths: list[int], tokens: int) -> int:
    """How many from the front fit, padded to the longest of them; at least two."""
    padded = np.maximum.accumulate(lengths) * np.arange(1, len(lengths) + 1)
    return max(2, int(np.searchsorted(padded, tokens, side="right")))


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
        captioned = (positions[:-1] >= border - 1) & mask[:, 1:].bool()
        return inputs, positions < border, captioned.flatten().nonzero().squeeze(1)


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
