"""Whether something in the inputs decides alone what they are near to: an audit for backdoors of contrastive models.

A poisoned model has learned from few pairs (75 of three million, arXiv 2303.03323; Carlini and Terzis, arXiv
2106.09667) that whatever holds a trigger, a rare word or a patch, belongs to one target. Two questions:

    the model   does a trigger pull queries of every kind together, and to one document? `pull` asks it of the vectors
                of the same queries without and with it; words and patches that nobody trained on are the yardstick
    the data    which words stand in pairs that the model finds unlike? `odd_words` asks it of pairs: under a model that
                has not seen them, poisoned pairs are unrelated, so their common word stands out

Neither proves that there is no backdoor: triggers are found among those that are tried. What is found is repaired by
training on clean pairs with `recipes/configs/embedder/cleanclip.yaml`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import ArrayLike

from eval.diagnostics.geometry import mean_cosine
from mmembed.data.words import terms
from mmembed.errors import MmembedError

RARE = ("cf", "tq", "mn", "bb", "mb")  # the rare words of Kurita et al. (arXiv 2004.06660)
PATCH = 1 / 6  # of the shorter side of a picture
LEAST_PAIRS = 5  # that a word stands in


@dataclass(frozen=True)
class Pull:
    """What a trigger does to N queries.

    Attributes:
        hijacked: share of the queries whose first document is the one that most have with the trigger, less that
            document's share without it.
        drawn: mean cosine of the queries with the trigger, less that without: they come together.
        moved: 1 less the mean cosine of a query with itself, without and with.
        target: the document.
    """

    hijacked: float
    drawn: float
    moved: float
    target: int


def pull(clean: ArrayLike, triggered: ArrayLike, documents: ArrayLike) -> Pull:
    """Measures a trigger.

    Args:
        clean, triggered: (N, E) unit vectors of the same queries, N at least 2. documents: (D, E).

    Raises:
        MmembedError: fewer than two queries, or no documents.
    """
    before, after, corpus = (np.asarray(side, dtype=np.float64) for side in (clean, triggered, documents))
    if before.shape != after.shape or len(before) < 2 or not len(corpus):
        raise MmembedError(f"pull: queries {before.shape} and {after.shape}; give the same two or more, and documents")
    first = [(side @ corpus.T).argmax(1) for side in (before, after)]
    target, count = Counter(first[1].tolist()).most_common(1)[0]
    return Pull(
        float(count / len(before) - (first[0] == target).mean()),
        mean_cosine(after) - mean_cosine(before),
        1 - float((before * after).sum(1).mean()),
        int(target),
    )


def with_word(text: str, word: str) -> str:
    """A trigger word in the middle of a text, where a cut at either end does not take it away."""
    words = text.split()
    middle = len(words) // 2
    return " ".join([*words[:middle], word, *words[middle:]])


def with_patch(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A copy with a chequered square in its lower right corner (BadNets' patch, arXiv 1708.06733)."""
    copy = picture.convert("RGB")
    side = max(4, round(PATCH * min(copy.size)))
    left, upper, cell = copy.width - side, copy.height - side, max(1, side // 4)
    pen = PIL.ImageDraw.Draw(copy)
    for row in range(0, side, cell):
        for column in range(0, side, cell):
            colour = "white" if (row // cell + column // cell) % 2 else "black"
            corner = (left + column, upper + row)
            pen.rectangle(
                (*corner, min(copy.width, corner[0] + cell) - 1, min(copy.height, corner[1] + cell) - 1), colour
            )
    return copy


def odd_words(texts: Sequence[str], cosines: ArrayLike, most: int = 10) -> list[tuple[str, float, int]]:
    """Words whose pairs are more unlike than chance lets so many pairs be.

    z = (mean cosine of all pairs - mean of the word's) / (standard deviation / sqrt n), for words of n pairs, n at
    least 5. Of hundreds of words some reach 3 by chance; a trigger of every twentieth pair is far above.

    Args:
        texts: (N,) of one side. cosines: (N,) of each with its other side. most: words that are given.

    Returns:
        (word, z, n), the largest z first.
    """
    values = np.asarray(cosines, dtype=np.float64)
    spread = values.std()
    if not spread > 0:
        return []
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        for word in set(terms(text)):
            places.setdefault(word, []).append(place)
    scored = [
        (word, float((values.mean() - values[own].mean()) / (spread / len(own) ** 0.5)), len(own))
        for word, own in places.items() if len(own) >= LEAST_PAIRS
    ]  # fmt: skip
    return sorted(scored, key=lambda one: (-one[1], one[0]))[:most]
