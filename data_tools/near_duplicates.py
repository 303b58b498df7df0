"""Texts and pictures that are nearly the same, in groups: what filters drop, and reports count.

Texts: MinHash (Broder 1997) over shingles of three words, by datasketch; bands of the signatures find candidates, and
the estimated Jaccard similarity decides, with a standard error of 0.035 at 0.8. Pictures: the perceptual hash of 256
bits, by imagehash, and, because that is blind to colour, the mean colours of 8 x 8 fields. Among 250 pages of text, as
among 250 photographs and 250 figures, no two are within the usual 8 bits, and of 1,531 emoji two are grouped; copies of
half the size, or saved anew as a poor JPEG, differ by 2 to 6. A crop of 3 % a side is another picture (50 bits); so are
some copies of very plain ones.

A group is what is near to its first member: groups do not chain from one text to quite another, and to keep the first
member of each is to keep a text near to each that is dropped. The result depends on the order, and on nothing else.

Cost: an iterable is read once; 0.5 ms and 512 bytes a text of 120 words, 3 ms and 250 bytes a picture, and 100 bytes
for each band in which it meets another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmembed.data.words import search_words
from mmembed.errors import MmembedError

if TYPE_CHECKING:
    from PIL.Image import Image

PERMUTATIONS = 128
SHINGLE = 3  # words
HASH_SIDE = 16  # of 256 bits
COLOUR_SIDE = 8
COLOUR_DISTANCE = 8.0  # of 255, the mean of all fields and channels
_FOUND = 0.99  # of the pairs at the threshold
_CHUNK = 4096
Near = Callable[[int, NDArray[np.int64]], NDArray[np.bool_]]


def text_groups(texts: Iterable[str], threshold: float = 0.8) -> list[list[int]]:
    """Groups of two and more places of texts whose shingles have a Jaccard similarity of `threshold` with the first's.

    Case, punctuation and white space make no difference; where a script has no spaces, pairs of characters are words.
    Texts without a word are in no group.

    Raises:
        MmembedError: the threshold is not above 0 and at most 1, or datasketch is not installed.

    >>> text_groups(["The bus is red, and late.", "A train.", "the bus is red and late", "The bus is blue and late."])
    [[0, 2]]
    """
    if not 0 < threshold <= 1:
        raise MmembedError(f"threshold: found {threshold}; give a similarity above 0, at most 1")
    signatures, places = _signatures(texts)  # (N, 128)
    rows, bands = _rows_and_bands(threshold)
    keys = np.stack(
        [_digests(signatures[:, band * rows : (band + 1) * rows]) for band in range(bands)], axis=1
    )  # (N, bands)

    def near(row: int, others: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (signatures[others] == signatures[row]).mean(axis=1) >= threshold

    return [[int(places[row]) for row in group] for group in _grouped(keys, near)]


def picture_groups(pictures: Iterable[Image | None], distance: int = 8) -> list[list[int]]:
    """Groups of two and more places of pictures that look like the first of the group.

    Args:
        pictures: None stands for one that cannot be opened, and is in no group.
        distance: how many of the 256 bits of the hashes may differ.

    Raises:
        MmembedError: the distance is not from 0 to 64, or imagehash is not installed.
    """
    _check_distance(distance)
    bits, colours, places = _looks(pictures)  # (N, 256), (N, 192)

    def near(row: int, others: NDArray[np.int64]) -> NDArray[np.bool_]:
        return _alike(bits[others], colours[others], bits[row], colours[row], distance)

    return [[int(places[row]) for row in group] for group in _grouped(_pieces(bits, distance), near)]


def picture_matches(
    pictures: Iterable[Image | None], known: Iterable[Image | None], distance: int = 8
) -> dict[int, int]:
    """The places of pictures that look like one of the known ones, each with the place of the first such one.

    Args:
        pictures, known: None stands for one that cannot be opened, and is like no other.
        distance: as `picture_groups`.

    Raises:
        MmembedError: as `picture_groups`.
    """
    _check_distance(distance)
    known_bits, known_colours, known_places = _looks(known)  # (M, 256), (M, 192)
    bits, colours, places = _looks(pictures)
    with_key: dict[tuple[int, int], list[int]] = {}
    for row, keys in enumerate(_pieces(known_bits, distance).tolist()):
        for key in enumerate(keys):
            with_key.setdefault(key, []).append(row)
    found = {}
    for row, keys in enumerate(_pieces(bits, distance).tolist()):
        others = np.array(sorted({one for key in enumerate(keys) for one in with_key.get(key, ())}), np.int64)
        close = others[_alike(known_bits[others], known_colours[others], bits[row], colours[row], distance)]
        if close.size:
            found[int(places[row])] = int(known_places[close[0]])
    return found


def shingles(text: str) -> set[bytes]:
    """Runs of three words; of a shorter text all its words, and nothing of one without any.

    >>> sorted(shingles("A red bus, a red bus."))
    [b'a red bus', b'bus a red', b'red bus a']
    """
    words = search_words(text)
    return {
        " ".join(words[at : at + SHINGLE]).encode() for at in range(max(min(1, len(words)), len(words) - SHINGLE + 1))
    }


def _signatures(texts: Iterable[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """(N, 128) and (N,): MinHashes of the texts that have words, and their places."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise MmembedError(f"near duplicates need datasketch ({error}); pip install 'mmembed[data]'") from None
    empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_hash, scheme="affine32")

    def rows() -> Iterator[tuple[int, Any]]:
        for place, text in enumerate(texts):
            if found := shingles(text):
                one = empty.copy()  # a new one would draw its permutations anew
                one.update_batch(found)
                yield place, one.hashvalues

    return _stacked(rows(), (PERMUTATIONS,), np.uint32)


def _looks(pictures: Iterable[Image | None]) -> tuple[NDArray[np.bool_], NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 256), (N, 192) and (N,): hashes and colours of the pictures that are there, and their places."""
    try:
        import imagehash
    except ImportError as error:
        raise MmembedError(f"near duplicates need imagehash ({error}); pip install 'mmembed[data]'") from None
    side = COLOUR_SIDE

    def rows() -> Iterator[tuple[int, Any]]:
        for place, picture in enumerate(pictures):
            if picture is not None:
                small = np.asarray(picture.convert("RGB").resize((side, side)), np.uint8).reshape(-1)
                bits = np.packbits(imagehash.phash(picture, hash_size=HASH_SIDE).hash.reshape(-1))
                yield place, np.concatenate([bits, small])

    rows_found, places = _stacked(rows(), (HASH_SIDE**2 // 8 + 3 * side**2,), np.uint8)
    packed, colours = rows_found[:, : HASH_SIDE**2 // 8], rows_found[:, HASH_SIDE**2 // 8 :]
    return np.unpackbits(packed, axis=1).astype(np.bool_), colours, places


def _check_distance(distance: int) -> None:
    if not 0 <= distance <= HASH_SIDE**2 // 4:
        raise MmembedError(f"distance: found {distance}; give 0 to {HASH_SIDE**2 // 4} of the {HASH_SIDE**2} bits")


def _pieces(bits: NDArray[np.bool_], distance: int) -> NDArray[np.uint64]:
    """(N, distance + 1): of two hashes within the distance one is equal, so no pair is missed."""
    pieces = np.array_split(np.arange(HASH_SIDE**2), distance + 1)
    return np.stack([_digests(np.packbits(bits[:, piece], axis=1)) for piece in pieces], axis=1)


def _alike(
    bits: NDArray[np.bool_],
    colours: NDArray[np.uint8],
    own: NDArray[np.bool_],
    colour: NDArray[np.uint8],
    distance: int,
) -> NDArray[np.bool_]:
    """(N,) which of N pictures look like one."""
    shift = np.abs(colours.astype(np.int16) - colour).mean(axis=1)
    return ((bits != own).sum(axis=1) <= distance) & (shift <= COLOUR_DISTANCE)


def _stacked(rows: Iterator[tuple[int, Any]], shape: tuple[int, ...], kind: Any) -> tuple[Any, NDArray[np.int64]]:
    """(N, *shape) and (N,), without a Python object a row."""
    full: list[Any] = []
    block, filled, places = np.empty((_CHUNK, *shape), kind), 0, [np.empty(0, np.int64)]
    place_block = np.empty(_CHUNK, np.int64)
    for place, row in rows:
        if filled == _CHUNK:
            full.append(block)
            places.append(place_block)
            block, place_block, filled = np.empty_like(block), np.empty_like(place_block), 0
        block[filled], place_block[filled] = row, place
        filled += 1
    return np.concatenate([*full, block[:filled]]), np.concatenate([*places, place_block[:filled]])


def _rows_and_bands(threshold: float) -> tuple[int, int]:
    """Of a signature: how long a band is, and how many there are. As long as pairs at the threshold are still found."""
    fits = [rows for rows in range(1, PERMUTATIONS + 1) if _found(threshold, rows) >= _FOUND]
    rows = max(fits, default=1)
    return rows, PERMUTATIONS // rows


def _found(similarity: float, rows: int) -> float:
    """How likely two texts are to share a band."""
    return 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows)


def _hash(shingle: bytes) -> int:
    return int.from_bytes(blake2b(shingle, digest_size=4).digest(), "little")


def _digests(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """(N, any) -> (N,): equal rows have equal digests."""
    rows = np.ascontiguousarray(rows)
    encoded = [blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(encoded), np.uint64)


def _grouped(keys: NDArray[np.uint64], near: Near) -> list[list[int]]:
    """Each row joins the first earlier leader that it shares a key with and is `near` to, or leads a group of its own.

    Args:
        keys: (N, B): rows that are equal in one column are candidates.
    """
    meets = np.stack([_repeated(column) for column in keys.T], axis=1)  # (N, B): another row has this key
    leaders: dict[tuple[int, int], list[int]] = {}
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(meets.any(axis=1)).tolist():
        shared = [(band, int(keys[row, band])) for band in np.flatnonzero(meets[row]).tolist()]
        candidates = np.array(sorted({leader for key in shared for leader in leaders.get(key, ())}), np.int64)
        close = candidates[near(row, candidates)] if candidates.size else candidates
        if close.size:
            groups.setdefault(int(close[0]), [int(close[0])]).append(row)
        else:
            for key in shared:
                leaders.setdefault(key, []).append(row)
    return [groups[leader] for leader in sorted(groups)]


def _repeated(column: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(N,) whether a value stands more than once."""
    _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
    return counts[inverse] > 1
