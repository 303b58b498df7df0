"""Pieces of the train texts without end, each with the teacher's vector of exactly that piece.

A few hundred thousand fixed texts are soon known by heart: the nano that had only them was .29 from the teacher's
direction on squad-en's train paragraphs and .48 on dev paragraphs. So the teacher reads along on the device, and a step
may ask it about any span of words, some with words exchanged. Both tokenizers split at white space, so a span's tokens
are those of its words, looked up: nothing is tokenized in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from recipes.nano import data
from recipes.nano.batches import MAX_TEXT_TOKENS, TextBatch, TextData
from recipes.nano.teacher import MAX_TOKENS

PROSE = (
    "squad-en",
    "openstax-text",
    "openstax-glossary",
    "medquad",
    "dbpedia-entity",
    "recipes",
    "argkp",
    "stsb-en",
    "banking77",
    "clinc150",
    "tldr-commands",
)
FEWEST_WORDS, MOST_WORDS = 2, 120
MOST_TOKENS_A_WORD = 2
SHORTEST = 0.7  # of a batch's span length, the longest
FROM_THE_START = 0.5  # of spans begin where their text begins
EXCHANGED_BATCHES, EXCHANGED_WORDS = 0.5, 0.2
MOST_SPANS = 4096  # a batch: the similarities of all with all are compared


@dataclass(frozen=True)
class SpanBatch:
    texts: TextBatch  # without teacher
    asked: torch.Tensor  # (B, T) the teacher's tokens, padded
    lengths: torch.Tensor  # (B,) how many of them


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, laid end to end."""

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        lengths = np.array([len(row) for row in rows])
        flat = np.fromiter((value for row in rows for value in row), dtype=np.int32, count=int(lengths.sum()))
        return cls(flat, np.cumsum(lengths) - lengths, lengths)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chosen rows end to end, and the length of each."""
        lengths = self.lengths[rows]
        return self.flat[ranges(self.starts[rows], lengths)], lengths


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each row, end to end."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


class SpanData:
    """All words of the English prose, and each different word's tokens in both tokenizers."""

    def __init__(
        self, texts: list[data.Text], tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: Any, text: TextData
    ):
        self.text = text
        prose = sorted((t for t in texts if t.source in PROSE and t.language == "en"), key=lambda t: t.source)
        units = [t.text.split() for t in prose]
        numbers: dict[str, int] = {}
        self.units = Ragged.of([[numbers.setdefault(word, len(numbers)) for word in words] for words in units])
        vocabulary = list(numbers)
        self.vocabulary = len(vocabulary)
        after, first = ([space + word for word in vocabulary] for space in (" ", ""))
        self.own = Ragged.of(tokenizer(after + first)["input_ids"])
        self.teachers = Ragged.of(teacher_tokenizer(vocabulary, add_special_tokens=False)["input_ids"])
        self.border = (teacher_tokenizer.cls_token_id, teacher_tokenizer.sep_token_id, teacher_tokenizer.pad_token_id)
        sources = np.repeat([t.source for t in prose], self.units.lengths)  # of each word
        self.first_word = np.flatnonzero(np.concatenate([[True], sources[1:] != sources[:-1]]))
        self.words_of_source = np.diff(np.append(self.first_word, len(sources)))
        share = self.words_of_source**0.5
        self.share = share / share.sum()

    def batch(self, seed: int, step: int, tokens: int) -> SpanBatch:
        """Spans of about one length, about `tokens` tokens together."""
        random = np.random.default_rng([seed, step, 8])
        longest = round(float(np.exp(random.uniform(np.log(FEWEST_WORDS), np.log(MOST_WORDS)))))
        size = min(MOST_SPANS, max(8, tokens // (MOST_TOKENS_A_WORD * longest)))
        begin, length = self._draw(size, longest, random)
        words = self.units.flat[ranges(begin, length)]
        if random.random() < EXCHANGED_BATCHES:
            others = self.units.flat[random.integers(len(self.units.flat), size=len(words))]
            words = np.where(random.random(len(words)) < EXCHANGED_WORDS, others, words)
        leading = np.zeros(len(words), dtype=bool)
        leading[np.cumsum(length) - length] = True
        own = _rows(self.own, words + leading * self.vocabulary, length, MAX_TEXT_TOKENS)
        asked = _rows(self.teachers, words, length, MAX_TOKENS - 2)
        widest = MOST_TOKENS_A_WORD * longest  # formulas and names are left out: one would pad all others
        kept = [row for row, ids in enumerate(own) if 0 < len(ids) <= widest and 0 < len(asked[row]) <= widest]
        own, asked = [own[row] for row in kept], [asked[row] for row in kept]
        return SpanBatch(self.text.pack(own, np.full(len(own), -1), []), *self._bordered(asked))

    def _draw(self, size: int, longest: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """First word and number of words of each span, by the root of the sources' sizes; none leaves its text."""
        source = random.choice(len(self.share), size=size, p=self.share)
        position = self.first_word[source] + (random.random(size) * self.words_of_source[source]).astype(np.int64)
        unit = np.searchsorted(self.units.starts, position, side="right") - 1
        begin = np.where(random.random(size) < FROM_THE_START, self.units.starts[unit], position)
        length = random.integers(max(1, round(SHORTEST * longest)), longest + 1, size=size)
        return begin, np.minimum(length, self.units.starts[unit] + self.units.lengths[unit] - begin)

    def _bordered(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end, pad = self.border
        lengths = np.array([len(row) + 2 for row in rows])
        ids = np.full((len(rows), int(lengths.max())), pad, dtype=np.int64)
        ids[:, 0] = begin
        for row, content in enumerate(rows):
            ids[row, 1 : len(content) + 1] = content
        ids[np.arange(len(rows)), lengths - 1] = end
        return torch.from_numpy(ids), torch.from_numpy(lengths)


def _rows(table: Ragged, words: np.ndarray, spans: np.ndarray, most: int) -> list[np.ndarray]:
    """Tokens of each span of words, at most `most`."""
    flat, lengths = table.take(words)
    ends = np.cumsum(lengths)[np.cumsum(spans) - 1]
    return [row[:most] for row in np.split(flat, ends[:-1])]
