"""Exact top-k search against a full sort in numpy."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import MmembedError
from mmembed.quantize import quantize, unit_rows
from mmembed.search import exact, open_vectors, pair_scores, top_k


def full_sort(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    """Indices by falling dot product, ties by the smaller index: numpy's stable sort of all scores."""
    scores = (queries.astype(np.float64) @ corpus.astype(np.float64).T).astype(np.float32)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(0, 7),
    corpus=st.integers(0, 60),
    values=st.integers(1, 3),
    k=st.integers(1, 70),
    corpus_rows=st.integers(1, 64),
    block_bytes=st.sampled_from([4, 200, 1 << 20]),
    products=st.sampled_from(["bfloat16", "float32"]),
)
def test_equals_a_full_sort_with_ties(seed, queries, corpus, values, k, corpus_rows, block_bytes, products):
    # Small integers make products exact and ties frequent, within a block and across blocks.
    random = np.random.default_rng(seed)
    left = random.integers(-values, values + 1, (queries, 3)).astype(np.float32)
    right = random.integers(-values, values + 1, (corpus, 3)).astype(np.float32)
    sizes = {"corpus_rows": corpus_rows, "block_bytes": block_bytes}
    hits = top_k(left, right, k, similarity="dot", products=products, **sizes)
    expected = full_sort(left, right, k)
    assert hits.indices.shape == hits.scores.shape == (queries, min(k, corpus))
    np.testing.assert_array_equal(hits.indices, expected)
    np.testing.assert_array_equal(hits.scores, np.take_along_axis(left @ right.T, expected, axis=1))


def clouds(kind: str, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """(count, size) vectors that make a rounded product useless in one way or another."""
    vectors = random.standard_normal((count, size))
    if kind == "one direction":  # cosines above .9999
        vectors = vectors * 1e-2 + np.linspace(1, 2, size)
    elif kind == "opposite":
        vectors = -np.abs(vectors)
    elif kind == "twins":  # every vector a hundred times, or nearly
        vectors = vectors[random.integers(0, max(1, count // 100), count)]
        vectors[::3] *= 1 + 1e-7 * random.standard_normal((len(vectors[::3]), 1))
    elif kind == "lengths":
        vectors *= 10.0 ** random.uniform(-12, 6, (count, 1))
    elif kind == "tiny":
        vectors *= 1e-37
    elif kind == "zeros":
        vectors[random.random(count) < 0.5] = 0
    return vectors.astype(np.float32)


@pytest.mark.parametrize("kind", ["plain", "one direction", "opposite", "twins", "lengths", "tiny", "zeros"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_nothing_changes_the_result(kind, similarity, k, rng, monkeypatch):
    """Blocks, threads, precision of the products, and how often candidates are dropped, scored or widened."""
    queries, corpus = (clouds(kind, count, 48, rng) for count in (90, 1500))
    of_queries, of_corpus = (unit_rows(one) if similarity == "cosine" else one for one in (queries, corpus))
    # numpy's einsum defines the score; BLAS may differ in the last bit of float64.
    scores = np.stack([np.einsum("e,ne->n", one, of_corpus, dtype=np.float64) for one in of_queries])
    rows = full_sort_of(scores.astype(np.float32), k)
    threads = torch.get_num_threads()
    try:
        for number, budget, dense, chunk in ((1, None, 64, 1 << 16), (2, k, 1, 64), (3, k + 5, 10**9, 7)):
            torch.set_num_threads(number)
            if budget is not None:
                monkeypatch.setattr(exact, "_budget", lambda _, budget=budget: budget)
            monkeypatch.setattr(exact, "DENSE", dense)
            monkeypatch.setattr(exact, "HIT_GROUPS", chunk)
            for products in ("bfloat16", "float32"):
                for sizes in ({}, {"corpus_rows": 333, "block_bytes": 1 << 14}):
                    hits = top_k(queries, corpus, k, similarity=similarity, products=products, **sizes)
                    np.testing.assert_array_equal(hits.indices, rows)
                    np.testing.assert_array_equal(
                        hits.scores, pair_scores(queries, corpus, rows, similarity=similarity)
                    )
    finally:
        torch.set_num_threads(threads)


def full_sort_of(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def test_a_pass_over_the_corpus_serves_as_many_queries_as_fit(rng, monkeypatch):
    queries, corpus = rng.standard_normal((40, 8)), rng.standard_normal((99, 8))
    whole = top_k(queries.astype(np.float32), corpus.astype(np.float32), 5)
    monkeypatch.setattr(exact, "QUERY_BYTES", 20_000)  # 8 queries
    parts = top_k(queries.astype(np.float32), corpus.astype(np.float32), 5)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_array_equal(parts.scores, whole.scores)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 3, 64, 300]), scale=st.sampled_from([1e-20, 1.0, 1e9]))
def test_products_are_within_the_bound(seed, size, scale):
    """The bound that candidates are dropped by holds on this processor."""
    random = np.random.default_rng(seed)
    queries, corpus = (random.standard_normal((count, size)).astype(np.float32) * scale for count in (70, 130))
    queries, corpus = queries.astype(np.float32), corpus.astype(np.float32)
    for narrow in (True, False):
        rows = exact.Rows(corpus, "dot", "corpus")
        search = exact._Search(queries, rows, 5, narrow, torch.device("cpu"), 1 << 20, len(corpus))
        block = search._read(np.arange(len(corpus)))
        for start, part in zip((0, 64), search._cut(1), strict=True):
            part.longest = block.length
            found = search._product(part, block)[0].double().numpy().T  # (q, n)
            wide = part.queries.astype(np.float64) @ (corpus.astype(np.float64) - search.mean.astype(np.float64)).T
            allowed = search._bound(part, block)[:, None] + np.abs(found) * 2.0**-8 * narrow
            assert (np.abs(found - wide) <= allowed).all(), start


def test_a_device_that_rounds_more_than_it_says_is_found_out(rng, monkeypatch, caplog):
    queries, corpus = (rng.standard_normal((count, 16)).astype(np.float32) for count in (70, 400))
    expected = top_k(queries, corpus, 5, products="float32").indices
    honest = exact._Search._product

    def rough(self, part, block):
        scores, buffer = honest(self, part, block)
        return (scores * (1.1 if part.narrow else 1.0)).to(scores.dtype), buffer

    monkeypatch.setattr(exact._Search, "_product", rough)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(top_k(queries, corpus, 5, products="bfloat16").indices, expected)
    assert "less exact" in caplog.text
    monkeypatch.setattr(exact._Search, "_product", lambda *given: (lambda s, b: (s * 1.1, b))(*honest(*given)))
    with pytest.raises(MmembedError, match="fp32_precision"):
        top_k(queries, corpus, 5, products="float32")


def test_all_rows_equal_come_in_order():
    for products in ("float32", "bfloat16"):
        ones = np.ones((3, 8), np.float32), np.ones((5000, 8), np.float32)
        hits = top_k(*ones, 100, corpus_rows=512, products=products)
        np.testing.assert_array_equal(hits.indices, np.tile(np.arange(100), (3, 1)))


@pytest.mark.parametrize("near", ["sampled", "others", "half"])
@pytest.mark.parametrize("products", ["bfloat16", "float32"])
def test_a_wrong_guess_is_found_out(near, products, rng, monkeypatch):
    """Where the first block, rows from all over the corpus, says nothing about the others."""
    again, search = [], exact._Search

    def counted(queries, *given, **options):
        again.append((len(queries), options))
        return search(queries, *given, **options)

    monkeypatch.setattr(exact, "_Search", counted)
    queries, corpus = rng.standard_normal((90, 32)).astype(np.float32), rng.standard_normal((4000, 32))
    center = queries.mean(axis=0)
    of_sample = np.arange(4000) % 8 == 0  # 500 of 4,000 rows
    corpus[{"sampled": of_sample, "others": ~of_sample, "half": np.arange(4000) < 2000}[near]] += 8 * center
    corpus = corpus.astype(np.float32)
    queries += center
    if near == "half":
        queries[45:] -= 4 * center
    hits = top_k(queries, corpus, 40, similarity="dot", products=products, corpus_rows=500)
    scores = np.stack([np.einsum("e,ne->n", one, corpus, dtype=np.float64) for one in queries])
    np.testing.assert_array_equal(hits.indices, full_sort_of(scores.astype(np.float32), 40))
    redone = sum(count for count, options in again if options == {"guess": False})
    assert redone > 60 if near == "sampled" else redone < 10


def test_a_guess_leaves_fewer_candidates(rng, monkeypatch):
    """That is what it is for: exact scores are taken of two thirds as many pairs, and nothing is sorted on the way."""
    queries, corpus = (rng.standard_normal((count, 64)).astype(np.float32) for count in (100, 20000))
    looked = []
    add = exact._Part.add
    monkeypatch.setattr(exact._Part, "add", lambda part, *found: looked.append(len(found[0])) or add(part, *found))
    counts = {}
    for sampled in (exact.SAMPLED, 10**9):
        monkeypatch.setattr(exact, "SAMPLED", sampled)
        looked.clear()
        hits = top_k(queries, corpus, 50, corpus_rows=2500)
        counts[sampled] = sum(looked), hits
    (few, hits), (many, expected) = counts.values()
    assert few < 0.7 * many
    np.testing.assert_array_equal(hits.indices, expected.indices)


def test_cosine_does_not_depend_on_length(rng):
    queries, corpus = rng.standard_normal((4, 16)), rng.standard_normal((50, 16)).astype(np.float32)
    scaled = corpus * rng.uniform(0.1, 9, (50, 1)).astype(np.float32)
    unit = corpus / np.linalg.norm(corpus, axis=1, keepdims=True)
    hits = top_k(queries.astype(np.float32), scaled, 10)
    np.testing.assert_array_equal(hits.indices, full_sort(queries, unit, 10))
    assert np.abs(hits.scores).max() <= 1 + 1e-6


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_stored_precisions_find_the_same_rows(rng, precision):
    corpus = rng.standard_normal((300, 64)).astype(np.float32)
    queries = corpus[:20] + 0.1 * rng.standard_normal((20, 64)).astype(np.float32)
    exactly = top_k(queries, corpus, 5)
    stored = top_k(queries, quantize(corpus, precision), 5)
    np.testing.assert_allclose(stored.scores, exactly.scores, atol=1e-2)
    np.testing.assert_array_equal(stored.indices[:, 0], np.arange(20))


def test_tensors_are_taken_in_their_precision(rng):
    corpus = torch.from_numpy(rng.standard_normal((60, 8)).astype(np.float32)).bfloat16()
    hits = top_k(corpus[:9], corpus, 3)
    np.testing.assert_array_equal(hits.indices, top_k(corpus[:9].float(), corpus.float(), 3).indices)
    np.testing.assert_array_equal(hits.indices[:, 0], np.arange(9))


def test_binary_scores_count_equal_signs(rng):
    vectors = rng.standard_normal((40, 20)).astype(np.float32)
    bits = quantize(vectors, "binary")
    hits = top_k(bits, bits, 40, dim=20)
    for query in range(40):
        for score, index in zip(hits.scores[query], hits.indices[query], strict=True):
            equal = int(((vectors[query] > 0) == (vectors[index] > 0)).sum())
            assert score == pytest.approx((2 * equal - 20) / 20, abs=1e-6)


def test_a_mapped_file_gives_what_the_array_gives(rng, tmp_path):
    corpus = rng.standard_normal((1000, 12)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", corpus)
    queries = torch.from_numpy(corpus[:9])
    assert isinstance(open_vectors(tmp_path / "vectors.npy"), np.memmap)
    from_file = top_k(queries, tmp_path / "vectors.npy", 7, corpus_rows=64)
    np.testing.assert_array_equal(from_file.indices, top_k(queries, corpus, 7).indices)
    np.testing.assert_array_equal(from_file.indices[:, 0], np.arange(9))
    np.testing.assert_array_equal(top_k(tmp_path / "vectors.npy", corpus, 1).indices[:, 0], np.arange(1000))


def test_pairs_have_the_scores_of_search(rng):
    queries, corpus = (rng.standard_normal((count, 24)).astype(np.float32) for count in (5, 9))
    rows = np.array([[3, -1], [0, 8], [-1, -1], [8, 8], [2, 1]])
    scores = pair_scores(queries, corpus, rows)
    hits = top_k(queries, corpus, 9)
    for query, place in np.ndindex(5, 2):
        row = rows[query, place]
        if row < 0:
            assert np.isnan(scores[query, place])
        else:
            assert scores[query, place] == hits.scores[query][hits.indices[query] == row][0]


def test_errors(rng, tmp_path):
    vectors = rng.standard_normal((5, 8)).astype(np.float32)
    with pytest.raises(MmembedError, match="queries have 8 dimensions, the corpus 4"):
        top_k(vectors, vectors[:, :4], 3)
    with pytest.raises(MmembedError, match="k is 0"):
        top_k(vectors, vectors, 0)
    with pytest.raises(MmembedError, match="did you mean 'cosine'"):
        top_k(vectors, vectors, 3, similarity="cosin")
    with pytest.raises(MmembedError, match="did you mean 'bfloat16'"):
        top_k(vectors, vectors, 3, products="bfloat")
    with pytest.raises(MmembedError, match="mmembed encode"):
        top_k(vectors, tmp_path / "none.npy", 3)
    with pytest.raises(MmembedError, match="dtype int32"):
        top_k(vectors, vectors.astype(np.int32), 3)
    with pytest.raises(MmembedError, match="two axes"):
        top_k(vectors, vectors[0], 3)
    with pytest.raises(MmembedError, match="compare by cosine"):
        top_k(vectors, vectors * np.float32(1e30), 3, similarity="dot")
    with pytest.raises(MmembedError, match="rows 1 to 5 of a corpus of 5"):
        pair_scores(vectors, vectors, np.arange(1, 6)[:, None])
    for broken_value in (np.nan, np.inf):
        broken = vectors.copy()
        broken[3, 2] = broken_value
        with pytest.raises(MmembedError, match="row 3 of the corpus"):
            top_k(vectors, broken, 3, corpus_rows=2)
        with pytest.raises(MmembedError, match="row 3 of the queries"):
            top_k(broken, vectors, 3)
        with pytest.raises(MmembedError, match="query 2 or one of its rows"):
            pair_scores(vectors, broken, np.array([[0], [1], [3], [2], [4]]))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
