"""Groups of near-duplicates against Jaccard similarities that loops compute, and against pictures changed by Pillow."""

import doctest
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from data_tools import near_duplicates
from data_tools.near_duplicates import picture_groups, text_groups
from mmembed.errors import MmembedError

CORPUS = Path("data/squad-en/corpus.jsonl")


def _passages(count: int) -> list[str]:
    with CORPUS.open(encoding="utf-8") as lines:
        return [json.loads(next(lines))["text"] for _ in range(count)]


def _runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def _jaccard(first: str, second: str) -> float:
    one, other = _runs(first), _runs(second)
    return len(one & other) / len(one | other)


def _worn(texts: list[str], seed: int) -> list[str]:
    """Each with some of its words taken out: similarities from 0.4 to 1."""
    generator = random.Random(seed)
    worn = []
    for text in texts:
        words = text.split()
        for _ in range(generator.randrange(0, 26)):
            del words[generator.randrange(len(words))]
        worn.append(" ".join(words))
    return worn


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_groups_are_those_of_the_jaccard_similarity_within_the_error_of_the_estimate(threshold: float) -> None:
    passages = [text for text in _passages(400) if text.isascii()]
    texts = passages + _worn(passages, seed=3)
    together = {member: group[0] for group in text_groups(texts, threshold) for member in group}
    similar = [_jaccard(text, texts[place + len(passages)]) for place, text in enumerate(passages)]
    found = [
        together.get(place) == place and together.get(place + len(passages)) == place for place in range(len(passages))
    ]
    sure = [yes for yes, similarity in zip(found, similar, strict=True) if similarity >= threshold + 0.07]
    never = [yes for yes, similarity in zip(found, similar, strict=True) if similarity <= threshold - 0.12]
    assert len(sure) > 10
    assert len(never) > 20
    assert sum(sure) / len(sure) > 0.97
    assert sum(never) / len(never) < 0.03


def test_passages_that_are_different_are_in_no_group() -> None:
    assert text_groups(_passages(300)) == []


def test_copies_in_other_case_and_spacing_are_one_group_named_by_the_first() -> None:
    first, second, third = _passages(3)
    copies = [first, second, first.upper(), third, f"  {first}\n", second.replace(" ", "\n")]
    assert text_groups(copies, threshold=1.0) == [[0, 2, 4], [1, 5]]


def test_groups_do_not_chain() -> None:
    words = [f"w{number}" for number in range(120)]
    sliding = [" ".join(words[start : start + 60]) for start in range(0, 60, 3)]  # each near to the next
    for group in text_groups(sliding, 0.8):
        assert all(_jaccard(sliding[group[0]], sliding[member]) > 0.68 for member in group)
    assert len({group[0] for group in text_groups(sliding, 0.8)}) > 1


def test_texts_without_spaces_are_compared_by_characters() -> None:
    text = "東京タワーは東京都港区芝公園にある総合電波塔である。高さは三百三十三メートル。"
    other = "大阪城は大阪市中央区の大阪城公園にある。"
    assert text_groups([text, text.replace("。", ""), other], threshold=0.7) == [[0, 1]]


def test_texts_without_words_are_in_no_group() -> None:
    assert text_groups(["", " ", "", "...", "..."]) == []
    assert text_groups([]) == []


def test_an_iterator_is_read_once_and_the_result_is_the_same_again() -> None:
    passages = _passages(40)
    texts = passages + _worn(passages, seed=5)

    def once() -> Iterator[str]:
        yield from texts

    assert text_groups(once()) == text_groups(texts) == text_groups(list(texts))


def _pictures(name: str, count: int) -> list[PIL.Image.Image]:
    column = pq.read_table(f"data/{name}/images.parquet", columns=["image"]).column("image").to_pylist()[:count]
    encoded = [one["bytes"] if isinstance(one, dict) else one for one in column]
    return [PIL.Image.open(io.BytesIO(one)).convert("RGB") for one in encoded]


def _saved(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return PIL.Image.open(buffer)


def test_smaller_and_poorer_copies_of_pictures_are_grouped_and_different_pictures_are_not() -> None:
    pictures = _pictures("clothing", 40) + _pictures("tech-figures", 40)
    halved = [one.resize((one.width // 2, one.height // 2)) for one in pictures]
    poor = [_saved(one, 40) for one in pictures]
    count = len(pictures)
    groups = picture_groups([*pictures, *halved, *poor])
    right = [group for group in groups if {member % count for member in group} == {group[0]}]
    assert right == groups  # no two different pictures together
    whole = [group for group in groups if len(group) == 3]
    assert len(whole) >= 0.9 * count


def test_colour_counts() -> None:
    generator = np.random.default_rng(0)
    grey = PIL.Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)).resize((64, 64))
    channels = [grey.point(lambda value: value // 2), grey, grey.point(lambda value: value // 3)]
    green = PIL.Image.merge("RGB", channels)
    blue = PIL.Image.merge("RGB", [channels[0], channels[2], channels[1]])
    assert picture_groups([green, blue, green.copy()]) == [[0, 2]]


def test_pictures_that_cannot_be_opened_are_in_no_group() -> None:
    picture = _pictures("clothing", 1)[0]
    assert picture_groups([None, picture, None, picture]) == [[1, 3]]
    assert picture_groups([]) == []


def test_hashes_within_the_distance_are_never_missed() -> None:
    generator = np.random.default_rng(1)
    bits = generator.random((300, 256)) < 0.5
    for place in range(150, 300):
        bits[place] = bits[place - 150]
        bits[place, generator.choice(256, 8, replace=False)] ^= True
    keys = np.stack(
        [near_duplicates._digests(np.packbits(bits[:, piece], axis=1)) for piece in np.array_split(np.arange(256), 9)],
        axis=1,
    )
    groups = near_duplicates._grouped(keys, lambda row, others: (bits[others] != bits[row]).sum(axis=1) <= 8)
    assert groups == [[place, place + 150] for place in range(150)]


@pytest.mark.parametrize("threshold", [0.0, 1.2, -1.0])
def test_a_wrong_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(MmembedError, match="threshold: found"):
        text_groups(["a"], threshold)


@pytest.mark.parametrize("distance", [-1, 65])
def test_a_wrong_distance_is_refused(distance: int) -> None:
    with pytest.raises(MmembedError, match="distance: found"):
        picture_groups([], distance)


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(near_duplicates).failed == 0
