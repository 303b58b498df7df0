"""Texts that a reader would not take for others: with typos, as a picture, in other words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike

from mmembed.data.pair_makers.rendered_text import RenderedText, load_font, misspell, render
from mmembed.data.words import join_words, split_words
from mmembed.errors import MmembedError

FONT, WIDTH = 13, 224  # pixels


def with_typos(texts: Sequence[str], rate: float, seed: int = 0) -> list[str]:
    """Texts in which a part of the words of four letters or more has two neighbouring inner letters exchanged."""
    generator = np.random.default_rng(seed)
    return [join_words(misspell(split_words(text), rate, generator)) for text in texts]


def readable(texts: Sequence[str]) -> list[int]:
    """Places of the texts that the font of Pillow can draw: it has Latin letters, and no glyph for most others."""
    font = RenderedText()
    return [place for place, text in enumerate(texts) if text.strip() and font.lacks(text) is None]


def as_picture(text: str) -> PIL.Image.Image:
    """A text drawn in black on white, `WIDTH` pixels wide and as high as its lines."""
    return render(split_words(text), load_font(None, FONT), FONT, WIDTH)


def paraphrases(left: ArrayLike, right: ArrayLike) -> dict[str, float]:
    """Whether pairs that mean the same are closest to each other.

    Args:
        left, right: (N, E) unit vectors of the two sides of N pairs, N at least 2.

    Returns:
        `found`: share of left sides whose right side is the nearest of all right sides (equal ones count as missed);
        `cosine` of pairs; `others`: mean cosine of what does not belong together.

    Raises:
        MmembedError: fewer than two pairs.
    """
    similarity = np.asarray(left, dtype=np.float64) @ np.asarray(right, dtype=np.float64).T  # (N, N)
    if len(similarity) < 2:
        raise MmembedError("paraphrases: give two pairs or more")
    own = np.diagonal(similarity)
    rest = np.where(np.eye(len(own), dtype=bool), -np.inf, similarity)
    others = (similarity.sum() - own.sum()) / (len(own) * (len(own) - 1))
    return {"found": float((own > rest.max(1)).mean()), "cosine": float(own.mean()), "others": float(others)}
