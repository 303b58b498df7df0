"""FAISS indexes and MaxSim rescoring, against exact search and against loops."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import MmembedError
from mmembed.quantize import quantize
from mmembed.search import FaissIndex, TokenVectors, rescore_maxsim, top_k

# FAISS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    corpus = random.standard_normal((2000, 24)).astype(np.float32)
    return corpus[:50] + 0.3 * random.standard_normal((50, 24)).astype(np.float32), corpus


@pytest.mark.parametrize(
    ("kind", "options", "recall"),
    [
        ("flat", {}, 1.0),
        ("ivf", {"lists": 20, "probes": 20}, 1.0),
        ("ivf", {"lists": 20, "probes": 5}, 0.7),
        ("hnsw", {}, 0.9),
    ],
)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_an_index_finds_what_exact_search_finds(data, kind, options, recall, similarity):
    pytest.importorskip("faiss")
    queries, corpus = data
    exactly = top_k(queries, corpus, 10, similarity=similarity)
    found, again = (FaissIndex(corpus, kind, similarity=similarity, **options).top_k(queries, 10) for _ in range(2))
    shared = [len({*left} & {*right}) for left, right in zip(found.indices, exactly.indices, strict=True)]
    assert np.mean(shared) / 10 >= recall
    np.testing.assert_array_equal(found.indices, again.indices)
    same = found.indices == exactly.indices
    np.testing.assert_array_equal(found.scores[same], exactly.scores[same])  # one definition of a score
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_an_index_over_int8(data):
    pytest.importorskip("faiss")
    queries, corpus = data
    stored = quantize(corpus, "int8")
    np.testing.assert_array_equal(FaissIndex(stored).top_k(queries, 5).indices, top_k(queries, stored, 5).indices)


def test_probes_that_find_too_little_are_filled_up():
    pytest.importorskip("faiss")
    corpus = np.eye(8, dtype=np.float32)
    found = FaissIndex(corpus, "ivf", lists=8, probes=1).top_k(corpus, 3)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(8))
    assert (found.indices[:, 1:] == -1).all() and np.isneginf(found.scores[:, 1:]).all()


@pytest.mark.parametrize(("kind", "options"), [("ivf", {"lists": 20}), ("ivf", {}), ("hnsw", {"links": 8})])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_a_saved_index_is_the_index(data, tmp_path, monkeypatch, kind, options, precision):
    pytest.importorskip("faiss")
    queries, corpus = data
    stored = quantize(corpus, precision)
    built = FaissIndex(stored, kind, **options)
    built.save(tmp_path / "a.faiss")
    monkeypatch.setattr(FaissIndex, "_build", None)
    opened = FaissIndex(stored, kind, saved=tmp_path / "a.faiss", **options)
    for found, expected in zip(opened.top_k(queries, 10), built.top_k(queries, 10), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["a.faiss"]


def test_probes_are_of_the_search_and_not_of_the_file(data, tmp_path):
    pytest.importorskip("faiss")
    queries, corpus = data
    FaissIndex(corpus, "ivf", lists=20, probes=1).save(tmp_path / "a.faiss")
    opened = FaissIndex(corpus, "ivf", saved=tmp_path / "a.faiss", lists=20, probes=20)
    np.testing.assert_array_equal(opened.top_k(queries, 5).indices, top_k(queries, corpus, 5).indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hnsw"}, "kind ivf, not hnsw"),
        ({"kind": "flat"}, "kind ivf, not flat"),
        ({"similarity": "dot"}, r"\(similarity cosine, not dot\)"),
        ({"lists": 30}, r"\(lists 20, not 30\)"),
        ({"corpus": np.s_[:1999]}, "count 2000, not 1999; vectors"),
        ({"corpus": np.s_[:, :8]}, "size 24, not 8; vectors"),
        ({"corpus": np.s_[::-1]}, r"\(vectors \w+, not \w+\)"),
    ],
)
def test_an_index_of_something_else_is_refused(data, tmp_path, change, message):
    pytest.importorskip("faiss")
    corpus = data[1]
    FaissIndex(corpus, "ivf", lists=20).save(tmp_path / "a.faiss")
    settings = {"corpus": np.s_[:], "kind": "ivf", "lists": 20, **change}
    if settings["kind"] != "ivf":
        del settings["lists"]
    settings["corpus"] = corpus[settings["corpus"]]
    with pytest.raises(MmembedError, match=rf"a.faiss was built of something else .*{message}"):
        FaissIndex(**settings, saved=tmp_path / "a.faiss")


def test_a_broken_index_is_refused(data, tmp_path):
    faiss = pytest.importorskip("faiss")
    corpus, file = data[1], tmp_path / "a.faiss"
    with pytest.raises(MmembedError, match="cannot be read"):
        FaissIndex(corpus, "hnsw", saved=file)
    FaissIndex(corpus, "hnsw").save(file)
    whole = file.read_bytes()
    for length in (0, 1, 500, len(whole) // 2, len(whole) - 5000, len(whole) - 300, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(MmembedError, match="was cut off"):
            FaissIndex(corpus, "hnsw", saved=file)
    file.write_bytes(whole[:1000] + whole[-1000:])
    with pytest.raises(MmembedError, match="a.faiss is broken"):
        FaissIndex(corpus, "hnsw", saved=file)
    faiss.write_index(faiss.IndexFlatIP(24), str(file))
    with pytest.raises(MmembedError, match="no index that `save` wrote"):
        FaissIndex(corpus, "hnsw", saved=file)
    with pytest.raises(MmembedError, match="a flat index has nothing to save"):
        FaissIndex(corpus).save(file)


def test_an_index_on_a_gpu_is_saved_as_one_of_a_cpu(data, tmp_path, monkeypatch):
    """With stand-ins for what FAISS has on GPUs alone: a wrapper that cannot be written."""
    faiss = pytest.importorskip("faiss")
    queries, corpus = data
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, number, index: [index], raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index[0], raising=False)
    there = FaissIndex(corpus, "ivf", device="cuda")
    there.save(tmp_path / "a.faiss")
    assert isinstance(FaissIndex(corpus, "ivf", device="cuda", saved=tmp_path / "a.faiss").index, list)
    opened = FaissIndex(corpus, "ivf", saved=tmp_path / "a.faiss")
    np.testing.assert_array_equal(opened.top_k(queries, 5).indices, FaissIndex(corpus, "ivf").top_k(queries, 5).indices)
    monkeypatch.setattr(FaissIndex, "_build", None)  # refused before anything is built
    with pytest.raises(MmembedError, match="HNSW has no GPU index"):
        FaissIndex(corpus, "hnsw", device="cuda")


def test_refusals_of_an_index(data, monkeypatch):
    queries, corpus = data
    with pytest.raises(MmembedError, match="did you mean 'hnsw'"):
        FaissIndex(corpus, "hnws")
    with pytest.raises(MmembedError, match="ivf has no option 'probe'; did you mean 'probes'"):
        FaissIndex(corpus, "ivf", probe=3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MmembedError, match="pip install faiss-cpu, or search exactly"):
        FaissIndex(corpus)
    monkeypatch.undo()
    pytest.importorskip("faiss")
    with pytest.raises(MmembedError, match="without vectors"):
        FaissIndex(corpus[:0])
    with pytest.raises(MmembedError, match="queries have 5 dimensions, the corpus 24"):
        FaissIndex(corpus).top_k(queries[:, :5], 2)
    with pytest.raises(MmembedError, match="row 7 of the corpus"):
        FaissIndex(np.where(np.arange(2000)[:, None] == 7, np.nan, corpus).astype(np.float32))
    with pytest.raises(MmembedError, match="for CPUs only"):
        FaissIndex(corpus, device="cuda")


# MaxSim ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 6), similarity=st.sampled_from(["cosine", "dot"]))
def test_maxsim_against_loops(seed, k, similarity):
    random = np.random.default_rng(seed)
    queries, documents = (
        [random.integers(-2, 3, (random.integers(1, 5), 4)).astype(np.float32) for _ in range(count)]
        for count in (3, 6)
    )
    candidates = np.stack([random.permutation(6)[:5] for _ in queries])
    candidates[0, 3:] = -1
    hits = rescore_maxsim(queries, documents, candidates, k, similarity=similarity)
    for query, own in enumerate(queries):
        scored = []
        for document in candidates[query][candidates[query] >= 0]:
            total = 0.0
            for left in own.astype(np.float64):
                total += max(_dot(left, right, similarity) for right in documents[document].astype(np.float64))
            scored.append((-total, document))
        expected = sorted(scored)[:k]
        found = hits.scores[query][: len(expected)]
        np.testing.assert_allclose(found, [-score for score, _ in expected], atol=1e-5)
        if similarity == "dot":  # integers are exact, so that ties are ties
            assert list(hits.indices[query][: len(expected)]) == [document for _, document in expected]
        assert (hits.indices[query][len(expected) :] == -1).all()


def _dot(left, right, similarity):
    if similarity == "dot":
        return float(left @ right)
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / lengths) if lengths else 0.0


def test_maxsim_reads_a_mapped_file_and_knows_no_other_queries(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.standard_normal((length, 8)).astype(np.float32) for length in (3, 1, 5, 2)]
    joined = TokenVectors.joined(documents)
    np.save(tmp_path / "tokens.npy", joined.vectors)
    mapped = TokenVectors(tmp_path / "tokens.npy", joined.starts)
    candidates = np.array([[3, 0, 2], [1, 2, 3]])
    queries = documents[:2]
    hits = rescore_maxsim(queries, mapped, candidates)
    for query in range(2):
        alone = rescore_maxsim(queries[query : query + 1], documents, candidates[query : query + 1, ::-1])
        np.testing.assert_array_equal(alone.scores[0], hits.scores[query])
        np.testing.assert_array_equal(alone.indices[0], hits.indices[query])


def test_refusals_of_maxsim():
    one, empty = np.ones((2, 4), np.float32), np.ones((0, 4), np.float32)
    with pytest.raises(MmembedError, match="document 1 has no vectors"):
        rescore_maxsim([one], [one, empty], np.array([[0, 1]]))
    with pytest.raises(MmembedError, match="candidates 0 to 2 of 2 documents"):
        rescore_maxsim([one], [one, one], np.array([[0, 2]]))
    with pytest.raises(MmembedError, match="for 1 queries"):
        rescore_maxsim([one], [one], np.array([[0], [0]]))
    with pytest.raises(MmembedError, match="row 2 of the documents"):
        rescore_maxsim([one], [one, one * np.float32(np.nan)], np.array([[0, 1]]))
