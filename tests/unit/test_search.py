"""Exact top-k search against a full sort in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import MmembedError
from mmembed.inference.quantize import quantize
from mmembed.inference.search import open_vectors, top_k


def full_sort(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    """Indices by falling dot product, ties by the smaller index: numpy's stable sort of all scores."""
    return np.argsort(-(queries.astype(np.float64) @ corpus.astype(np.float64).T), axis=1, kind="stable")[:, :k]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(0, 7),
    corpus=st.integers(0, 60),
    values=st.integers(1, 3),
    k=st.integers(1, 70),
    corpus_rows=st.integers(1, 64),
    block_bytes=st.sampled_from([4, 200, 1 << 20]),
)
def test_equals_a_full_sort_with_ties(seed, queries, corpus, values, k, corpus_rows, block_bytes):
    # Small integers make products exact and ties frequent, within a block and across blocks.
    random = np.random.default_rng(seed)
    left = random.integers(-values, values + 1, (queries, 3)).astype(np.float32)
    right = random.integers(-values, values + 1, (corpus, 3)).astype(np.float32)
    hits = top_k(left, right, k, similarity="dot", corpus_rows=corpus_rows, block_bytes=block_bytes)
    expected = full_sort(left, right, k)
    assert hits.indices.shape == hits.scores.shape == (queries, min(k, corpus))
    np.testing.assert_array_equal(hits.indices, expected)
    np.testing.assert_array_equal(hits.scores, np.take_along_axis(left @ right.T, expected, axis=1))


def test_all_rows_equal_come_in_order():
    hits = top_k(np.ones((3, 8), np.float32), np.ones((5000, 8), np.float32), 100, corpus_rows=512)
    np.testing.assert_array_equal(hits.indices, np.tile(np.arange(100), (3, 1)))


def test_cosine_does_not_depend_on_length(rng):
    queries, corpus = rng.standard_normal((4, 16)), rng.standard_normal((50, 16)).astype(np.float32)
    scaled = corpus * rng.uniform(0.1, 9, (50, 1)).astype(np.float32)
    unit = corpus / np.linalg.norm(corpus, axis=1, keepdims=True)
    hits = top_k(queries.astype(np.float32), scaled, 10)
    np.testing.assert_array_equal(hits.indices, full_sort(queries, unit, 10))
    assert np.abs(hits.scores).max() <= 1 + 1e-6


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_stored_precisions_find_the_same_rows(rng, precision):
    corpus = rng.standard_normal((300, 64)).astype(np.float32)
    queries = corpus[:20] + 0.1 * rng.standard_normal((20, 64)).astype(np.float32)
    exact = top_k(queries, corpus, 5)
    stored = top_k(queries, quantize(corpus, precision), 5)
    np.testing.assert_allclose(stored.scores, exact.scores, atol=1e-2)
    np.testing.assert_array_equal(stored.indices[:, 0], np.arange(20))


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


def test_errors(rng, tmp_path):
    vectors = rng.standard_normal((5, 8)).astype(np.float32)
    with pytest.raises(MmembedError, match="queries have 8 dimensions, the corpus 4"):
        top_k(vectors, vectors[:, :4], 3)
    with pytest.raises(MmembedError, match="k is 0"):
        top_k(vectors, vectors, 0)
    with pytest.raises(MmembedError, match="did you mean 'cosine'"):
        top_k(vectors, vectors, 3, similarity="cosin")
    with pytest.raises(MmembedError, match="mmembed encode"):
        top_k(vectors, tmp_path / "none.npy", 3)
    with pytest.raises(MmembedError, match="dtype int32"):
        top_k(vectors, vectors.astype(np.int32), 3)
    broken = vectors.copy()
    broken[3, 2] = np.nan
    with pytest.raises(MmembedError, match="row 3 of the corpus"):
        top_k(vectors, broken, 3, corpus_rows=2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
