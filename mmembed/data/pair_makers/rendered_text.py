"""Rendered text: a document's words as a picture, drawn in a new size, width and place each time.

With `query: text` a model with eyes learns to read: a text finds its own picture. With `query: image` both sides are
pictures, of different font sizes and widths, and a model cannot go by the look of a line. The words of a visit are at
most `max_words` in a row, from a random place, so that the picture stays small: it has about

pixels = words * 7 letters * (size / 2) pixels a letter * 1.4 size pixels a line

which is 34,000 pixels at 40 words of 13 pixels, some 35 tokens where one is 32 x 32 pixels (Qwen3-VL); a processor
enlarges what is below its least area (`lengths.min_pixels`). `typos` exchange two neighbouring letters inside a word
and `swaps` two neighbouring words, in the positive alone: a reader gets over both.

Source: Xiao et al., "Pixel Sentence Representation Learning", arXiv 2402.08183, whose first stage contrasts rendered
sentences with typos and words in another order (its rates could not be read, so both are off unless asked for); the
pair of a text and a picture, and sizes and widths, are ours. The font is the one that Pillow brings, which has Latin
letters only: words with others are left out, and documents that have mostly such words are refused. Cost: 3.6 ms a
picture of 40 words.

When: pages and screenshots with text are searched for, and only the texts are there.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from pydantic import Field

from mmembed.content import Content, Image, Text
from mmembed.data.pair_base import Pair, PairMaker
from mmembed.data.words import Word, join_words, split_words
from mmembed.errors import ConfigError
from mmembed.registry import Positive

Rate = Annotated[float, Field(ge=0, le=1)]
_LINE = 1.4  # of the font's size
_MARGIN = 4  # pixels
_TYPO_LETTERS = 4  # a shorter word has no two letters inside
_NO_CHARACTER = "\U0010fffe"  # what a font shows for it, it shows for every letter that it lacks


class RenderedText(PairMaker):
    """The document's words and a picture of them, or two pictures (Pixel Sentence).

    Args:
        query: whether the query is the words, or a picture too.
        max_words: words of a visit.
        font_size, width: from and to, in pixels, of the font and of the picture; its height is what the words take.
        typos: part of the positive's words of four letters or more with two inner letters exchanged.
        swaps: part of the positive's words that change places with the next.
        font: a TrueType or OpenType file; Pillow's own if None.
    """

    name: ClassVar[str] = "rendered_text"
    gives: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(
        self,
        query: Literal["text", "image"] = "text",
        max_words: Positive = 40,
        font_size: Sequence[Positive] = (11, 16),
        width: Sequence[Positive] = (160, 256),
        typos: Rate = 0.0,
        swaps: Rate = 0.0,
        font: str | None = None,
    ) -> None:
        self.query, self.max_words, self.typos, self.swaps, self.font = query, max_words, typos, swaps, font
        self.font_size, self.width = _range("font_size", font_size), _range("width", width)
        if self.width[0] < 6 * self.font_size[1]:
            raise ConfigError(
                f"pair_makers.rendered_text: a width of {self.width[0]} pixels is narrow for a font_size of "
                f"{self.font_size[1]}; give six times as much"
            )
        load_font(self.font, self.font_size[0])

    def lacks(self, text: str) -> tuple[str, str] | None:
        words = split_words(text)
        shown = len(self._shown(words))
        if 2 * shown > len(words):
            return None
        letters = "".join(sorted({letter for letter in text if not _is_shown(self.font, letter)}))[:5]
        found = f"the font shows {shown} of {len(words)} words, it has no '{letters}' (option font: a file)"
        return found, "no glyph"

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        words = self._shown(split_words(text))
        start = int(generator.integers(max(0, len(words) - self.max_words) + 1))
        chosen = words[start : start + self.max_words]
        query: Content = (Text(join_words(chosen)),)
        if self.query == "image":
            query = (Image(self._picture(chosen, generator)),)
        altered = misspell(swap(chosen, self.swaps, generator), self.typos, generator)
        return Pair(query, (Image(self._picture(altered, generator)),))

    def _shown(self, words: Sequence[Word]) -> list[Word]:
        return [word for word in words if all(_is_shown(self.font, letter) for letter in word.text)]

    def _picture(self, words: Sequence[Word], generator: np.random.Generator) -> PIL.Image.Image:
        size, width = (int(generator.integers(low, high + 1)) for low, high in (self.font_size, self.width))
        return render(words, load_font(self.font, size), size, width, indent=int(generator.integers(size + 1)))


def render(
    words: Sequence[Word], font: PIL.ImageFont.FreeTypeFont, size: int, width: int, indent: int = 0
) -> PIL.Image.Image:
    """Black words on white, `width` pixels wide and as high as their lines; words that are wider are broken.

    >>> render(split_words("a red bus"), load_font(None, 12), size=12, width=100).size
    (100, 24)
    """
    room, space = width - 2 * _MARGIN, font.getlength(" ")
    placed: list[tuple[float, int, str]] = []  # pixels from the left, line, text
    at, line = float(indent), 0
    for word in words:
        at += space if word.gap else 0
        for piece in _pieces(word.text, font, room):
            length = font.getlength(piece)
            if at + length > room and at > 0:
                at, line = 0.0, line + 1
            placed.append((_MARGIN + at, line, piece))
            at += length
    pitch = int(_LINE * size)
    picture = PIL.Image.new("RGB", (width, (line + 1) * pitch + 2 * _MARGIN), "white")
    pen = PIL.ImageDraw.Draw(picture)
    for left, row, piece in placed:
        pen.text((left, _MARGIN + row * pitch), piece, fill="black", font=font)
    return picture


def misspell(words: Sequence[Word], rate: float, generator: np.random.Generator) -> list[Word]:
    """Each word of four letters or more, with probability `rate`, with two neighbouring inner letters exchanged.

    >>> misspell([Word("", "bus"), Word(" ", "open")], 1.0, np.random.default_rng(0))
    [Word(gap='', text='bus'), Word(gap=' ', text='oepn')]
    """
    altered = []
    for word, chance in zip(words, generator.random(len(words)).tolist(), strict=True):
        text = word.text
        if chance < rate and len(text) >= _TYPO_LETTERS:
            at = 1 + int(generator.integers(len(text) - 3))
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        altered.append(Word(word.gap, text))
    return altered


def swap(words: Sequence[Word], rate: float, generator: np.random.Generator) -> list[Word]:
    """Words that change places with the next, each with probability `rate`; one that has moved stays.

    >>> join_words(swap(split_words("a red bus here"), 1.0, np.random.default_rng(0)))
    'red a here bus'
    """
    texts, at = [word.text for word in words], 0
    chances = generator.random(len(words)).tolist()
    while at < len(texts) - 1:
        if chances[at] < rate:
            texts[at], texts[at + 1] = texts[at + 1], texts[at]
            at += 1
        at += 1
    return [Word(word.gap, text) for word, text in zip(words, texts, strict=True)]


@functools.cache
def load_font(file: str | None, size: int) -> PIL.ImageFont.FreeTypeFont:
    """A font of `size` pixels. Raises ConfigError where there is none."""
    try:
        font = PIL.ImageFont.load_default(size) if file is None else PIL.ImageFont.truetype(file, size)
    except (OSError, ImportError) as error:
        raise ConfigError(f"pair_makers.rendered_text.font: {file or 'the font of Pillow'}: {error}") from None
    if not isinstance(font, PIL.ImageFont.FreeTypeFont):
        raise ConfigError("pair_makers.rendered_text.font: this Pillow is built without FreeType; install its wheel")
    return font


@functools.cache
def _is_shown(file: str | None, letter: str) -> bool:
    """Whether a font has a glyph of a letter. Marks that are not to be seen count as missing: a font draws boxes."""
    if unicodedata.category(letter) == "Cf":
        return False
    font = load_font(file, 16)
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_CHARACTER))


def _pieces(word: str, font: PIL.ImageFont.FreeTypeFont, room: float) -> list[str]:
    """A word in pieces that are no wider than `room`."""
    pieces, rest = [], word
    while font.getlength(rest) > room and len(rest) > 1:
        fitting = next(
            count for count in range(len(rest) - 1, 0, -1) if count == 1 or font.getlength(rest[:count]) <= room
        )
        pieces.append(rest[:fitting])
        rest = rest[fitting:]
    return [*pieces, rest]


def _range(key: str, value: Sequence[int]) -> tuple[int, int]:
    if len(value) != 2 or value[0] > value[1]:
        raise ConfigError(f"pair_makers.rendered_text.{key}: found {list(value)}; give two numbers, from and to")
    return value[0], value[1]
