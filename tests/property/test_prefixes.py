"""Groups of rows with a common beginning: exact, each row once, and as good as a search over all ways to group."""

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.content import Image
from mmembed.data.collate import plan_chunks
from mmembed.data.prefixes import LEAST_SAVED, SHORTEST, group_by_prefix
from mmembed.preprocess import Row


def common(rows):
    """The length of the longest common beginning, by plain comparison."""
    count = 0
    while all(len(row) > count for row in rows) and len({row[count] for row in rows}) == 1:
        count += 1
    return count


def rows_with_beginnings(draw_seed, beginnings, count, own):
    """Rows of a random beginning (or none) and random own tokens."""
    generator = random.Random(draw_seed)
    heads = [[generator.randrange(3) for _ in range(length)] for length in beginnings]
    return [
        generator.choice([*heads, []]) + [generator.randrange(3) for _ in range(generator.randint(1, own))]
        for _ in range(count)
    ]


@given(
    seed=st.integers(0, 999),
    beginnings=st.lists(st.integers(1, 40), max_size=4),
    count=st.integers(1, 40),
    own=st.integers(1, 30),
    chunk_tokens=st.integers(1, 500),
)
def test_groups_are_exact(seed, beginnings, count, own, chunk_tokens):
    ids = rows_with_beginnings(seed, beginnings, count, own)
    limits = [random.Random(seed + row).randint(0, len(tokens) - 1) for row, tokens in enumerate(ids)]
    groups = group_by_prefix(ids, limits, chunk_tokens)
    assert sorted(row for group in groups for row in group.rows) == list(range(count))
    for group in groups[:-1]:
        assert len(group.rows) > 1
        assert SHORTEST <= group.prefix <= min(limits[row] for row in group.rows)
        assert group.prefix <= common([ids[row] for row in group.rows])
        saved = group.prefix * (len(group.rows) - 1)
        assert saved >= LEAST_SAVED * sum(len(ids[row]) for row in group.rows)
        assert saved >= min(chunk_tokens / 8, sum(map(len, ids)) / 10)
    assert groups[-1].prefix == 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    beginnings=st.lists(st.integers(4, 20), max_size=3),
    count=st.integers(2, 9),
    chunk_tokens=st.integers(1, 300),
)
def test_groups_save_as_much_as_the_best_cut_of_the_sorted_rows(seed, beginnings, count, chunk_tokens):
    """Rows with a common beginning are neighbours when sorted, so every way to cut the sorted rows is every way."""
    ids = sorted(rows_with_beginnings(seed, beginnings, count, 6))
    least = min(chunk_tokens / 8, sum(map(len, ids)) / 10)

    def saved(part):
        prefix = min(common(part), min(map(len, part)) - 1)
        value = prefix * (len(part) - 1)
        return value if prefix >= SHORTEST and value >= max(least, LEAST_SAVED * sum(map(len, part))) else 0

    best = 0
    for cuts in range(2 ** (count - 1)):
        bounds = [0, *(at for at in range(1, count) if cuts >> (at - 1) & 1), count]
        best = max(best, sum(saved(ids[start:stop]) for start, stop in pairwise(bounds)))
    found = group_by_prefix(ids, [len(row) - 1 for row in ids], chunk_tokens)
    assert sum(group.prefix * (len(group.rows) - 1) for group in found if group.prefix) == best


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 60),
    chunk_tokens=st.integers(1, 400),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10)),
)
def test_plan_with_prefixes(seed, count, chunk_tokens, chunk_rows):
    generator = random.Random(seed)
    rows = [
        Row(ids, images=(Image("picture.png"),) if generator.random() < 0.3 else ())
        for ids in rows_with_beginnings(seed, [30, 12, 5], count, 30)
    ]
    chunks = plan_chunks(rows, chunk_tokens, chunk_rows, shareable=[len(row) - 1 for row in rows])
    assert sorted(index for chunk in chunks for index in chunk.index.tolist()) == list(range(count))
    for chunk in chunks:
        longest = max(map(len, chunk.rows))
        assert chunk.shared < min(map(len, chunk.rows)) and chunk.shared <= common([row.ids for row in chunk.rows])
        assert chunk.padded_tokens == chunk.shared + len(chunk.rows) * (longest - chunk.shared)
        assert chunk.padded_tokens <= chunk_tokens or len(chunk.rows) == 1
        assert chunk_rows is None or len(chunk.rows) <= chunk_rows
        assert len({bool(row.images) for row in chunk.rows}) == 1
