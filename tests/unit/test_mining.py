"""Rules of mining against loops, SaHa against a second writing of it, and bad input."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.errors import ConfigError, MmembedError
from mmembed.mining import MINERS, Candidates, mine, uniform
from mmembed.mining.debcse import positive_weights, shared_words
from mmembed.mining.mcl import composite, next_stage
from mmembed.mining.owner_similarity import OwnerSimilarity, with_owners
from mmembed.mining.retrieval import retrieve
from mmembed.mining.saha import SelfAware
from mmembed.search import FaissIndex


def test_barred_rows_and_their_copies_are_never_chosen_and_no_positives():
    rows = np.array([[0, 1, 2, 3, 4]])
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
    contents = np.array([0, 1, 2, 3, 1, 5])  # 4 is a copy of 1
    given = {"positive_scores": np.array([[0.95]], np.float32), "contents": contents, "barred": np.array([[1, -1]])}
    found = Candidates.of(rows, scores, np.array([[5]]), 6, **given)
    assert found.rows.tolist() == [[0, 2, 3, -1, -1]]
    assert found.rescored(-found.scores).rows.tolist() == [[3, 2, 0, -1, -1]]
    assert found.least_positive("margin") == pytest.approx(0.95)
    none = Candidates.of(rows[:, :1], scores[:, :1], np.array([[5]]), 6, **given)
    fill = [MINERS.build("random_fill")]
    assert sorted(mine(none, fill, 4)[0].tolist()) == [-1, 0, 2, 3]
    with pytest.raises(MmembedError, match="barred 1 to 9 of a corpus of 6"):
        Candidates.of(rows, scores, np.array([[5]]), 6, barred=np.array([[1, 9]]))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def listed(candidates: Candidates, query: int) -> list[tuple[int, float]]:
    """(row, score) of a query's candidates, best first."""
    valid = candidates.valid[query]
    return list(zip(candidates.rows[query][valid].tolist(), candidates.scores[query][valid].tolist(), strict=True))


def by_loops(block: dict, candidates: Candidates, query: int) -> list[int]:
    """What each filter keeps, written again, one candidate at a time."""
    positives = [
        float(score)
        for row, score in zip(candidates.positives[query], candidates.positive_scores[query], strict=True)
        if row >= 0
    ]
    least = min(positives)
    kept = []
    for rank, (row, score) in enumerate(listed(candidates, query)):
        if block["type"] == "margin":
            good = score <= least - block["margin"]
        elif block["type"] == "percent_of_positive":
            good = score <= least - abs(least) * block["percent"] / 100
        elif block["type"] == "threshold":
            good = block["least"] <= score <= block["most"]
        elif block["type"] == "rank_window":
            good = block["first"] <= rank < block["last"]
        else:
            own = {candidates.clusters[one] for one in candidates.positives[query] if one >= 0}
            good = candidates.clusters[row] in own
        if good:
            kept.append(row)
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block=st.sampled_from(
        [
            {"type": "margin", "margin": 0.1},
            {"type": "margin", "margin": 0.0},
            {"type": "percent_of_positive", "percent": 5.0},
            {"type": "percent_of_positive", "percent": 100.0},
            {"type": "threshold", "most": 0.4, "least": -0.3},
            {"type": "rank_window", "first": 2, "last": 5},
            {"type": "mcl"},
        ]
    ),
)
def test_filters_against_loops(seed, block):
    random = np.random.default_rng(seed)
    rows = np.stack([random.permutation(20)[:10] for _ in range(5)])
    positives = np.stack([random.permutation(20)[:2] for _ in range(5)])
    positives[random.random(5) < 0.5, 1] = -1
    candidates = Candidates.of(
        rows,
        random.uniform(-1, 1, rows.shape),
        positives,
        20,
        positive_scores=random.uniform(-1, 1, positives.shape),
        clusters=random.integers(0, 3, 20),
    )
    chosen = mine(candidates, [MINERS.build(block)], 10)
    for query in range(5):
        assert chosen[query][chosen[query] >= 0].tolist() == by_loops(block, candidates, query)


def test_candidates_are_ordered_and_rid_of_positives_and_copies():
    contents = np.array([7, 7, 3, 4, 5, 3, 6])  # 0 and 1 are one document, 2 and 5 another
    candidates = Candidates.of(
        np.array([[4, 2, -1, 5, 0, 3, 6, 6]]),
        np.array([[0.5, 0.9, 0.0, 0.8, 0.99, 0.5, 0.1, 0.1]]),
        np.array([[1, -1]]),
        7,
        contents=contents,
    )
    assert candidates.rows.tolist() == [[2, 3, 4, 6, -1, -1, -1, -1]]  # 3 before 4: a tie goes to the smaller row
    np.testing.assert_allclose(candidates.scores[0, :4], [0.9, 0.5, 0.5, 0.1])
    assert np.isneginf(candidates.scores[0, 4:]).all()


def test_a_teachers_scores_order_anew(rng):
    candidates = Candidates.of(np.array([[3, 4, 5]]), np.array([[0.9, 0.8, 0.7]]), np.array([[0]]), 6)
    rescored = candidates.rescored(np.array([[0.1, 0.3, 0.2]]), np.array([[0.25]]))
    assert rescored.rows.tolist() == [[4, 5, 3]]
    assert mine(rescored, [MINERS.build({"type": "margin", "margin": 0.01})], 3).tolist() == [[5, 3, -1]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 12),
    blocks=st.sampled_from(
        [
            [{"type": "margin", "margin": 0.1}],
            [{"type": "percent_of_positive", "percent": 5.0}],
            [{"type": "threshold", "most": 0.3, "least": 0.2}],
            [
                {"type": "threshold", "most": 0.5},
                {"type": "margin", "margin": 0.0},
                {"type": "rank_window", "first": 3},
            ],
        ]
    ),
)
def test_a_fill_brings_nothing_back_that_scores_above_a_filters_bound(seed, depth, blocks):
    """Whatever ranks the positive has: of all rows that are chosen, those beyond the candidates included."""
    random = np.random.default_rng(seed)
    corpus, queries = random.standard_normal((60, 3)).astype(np.float32), random.standard_normal((30, 3))
    positives = random.integers(0, 60, (30, 1))
    candidates = retrieve(queries.astype(np.float32), corpus, positives, depth)
    rules = [MINERS.build(block) for block in blocks]
    chosen = mine(candidates, [*rules, MINERS.build("random_fill")], 8)
    scores = np.take_along_axis(unit(queries) @ unit(corpus).T, np.maximum(chosen, 0), axis=1)
    least = candidates.positive_scores.astype(np.float64)
    for block in blocks:
        most = {
            "margin": least - block.get("margin", 0),
            "percent_of_positive": least - abs(least) * 0.05,
            "threshold": np.full_like(least, block.get("most", 1)),
            "rank_window": np.ones_like(least),
        }[block["type"]]
        assert (scores <= most + 1e-6)[chosen >= 0].all()
    last = candidates.scores[:, -1:]
    whole = (last <= np.min([rule.ceiling(candidates) for rule in rules], axis=0))[:, 0]
    assert (chosen[whole] >= 0).all(), "where the last candidate passes, there are enough"


def test_a_window_or_a_cluster_bounds_no_score_and_all_are_filled(rng):
    corpus = rng.standard_normal((50, 4)).astype(np.float32)
    clusters = np.arange(50)  # a positive's holds nothing else
    candidates = retrieve(corpus[:9], corpus, np.arange(9)[:, None], 6, clusters=clusters)
    fill = MINERS.build("random_fill")
    drawn = mine(candidates, [MINERS.build({"type": "rank_window", "first": 6}), fill], 5, seed=3)
    assert (drawn >= 0).all() and not (drawn[:, :, None] == candidates.rows[:, None]).any()
    for rule in ("mcl", {"type": "threshold", "least": 2.0}, {"type": "threshold", "most": 1.1, "least": 1.01}):
        np.testing.assert_array_equal(mine(candidates, [MINERS.build(rule), fill], 5, seed=3), drawn)


def test_a_teacher_that_doubts_a_candidate_says_nothing_of_rows_it_has_not_seen():
    found = Candidates.of(np.array([[1, 2]] * 2), np.array([[0.9, 0.8]] * 2), np.array([[0]] * 2), 9)
    taught = found.rescored(np.array([[0.9, 0.1], [0.2, 0.1]]), np.array([[0.5], [0.5]]))
    chosen = mine(taught, [MINERS.build("margin"), MINERS.build("random_fill")], 4)
    assert chosen[0].tolist() == [2, -1, -1, -1]
    assert chosen[1, :2].tolist() == [1, 2] and (chosen[1, 2:] > 2).all()


def test_clusters_take_turns():
    clusters = np.array([0, 0, 0, 1, 1, 2])
    candidates = Candidates.of(
        np.arange(6)[None], -np.arange(6)[None].astype(float), np.array([[6]]), 7, clusters=np.append(clusters, 3)
    )
    assert mine(candidates, [MINERS.build("cluster_diverse")], 6).tolist() == [[0, 3, 5, 1, 4, 2]]
    most = MINERS.build({"type": "cluster_diverse", "most": 1})
    assert mine(candidates, [most], 6).tolist() == [[0, 3, 5, -1, -1, -1]]


def test_random_choices_are_even_and_go_by_seed_and_key():
    queries, found = 4000, 6
    rows = np.tile(np.arange(found), (queries, 1))
    candidates = Candidates.of(rows, np.zeros(rows.shape), np.full((queries, 1), found), found + 1)
    first = mine(candidates, [MINERS.build("random")], 2, seed=3)
    again = mine(candidates, [MINERS.build("random")], 2, seed=3)
    other = mine(candidates, [MINERS.build("random")], 2, seed=4)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    pairs = np.bincount(first[:, 0] * found + first[:, 1], minlength=found**2).reshape(found, found)
    expected = queries / (found * (found - 1))
    assert not pairs.diagonal().any()
    assert np.abs(pairs[~np.eye(found, dtype=bool)] - expected).max() < 5 * math.sqrt(expected)


def test_uniform_numbers():
    numbers = uniform(0, np.arange(300, dtype=np.uint64), np.tile(np.arange(300), (300, 1)))
    assert numbers.min() > 0 and numbers.max() < 1
    assert np.unique(numbers).size == numbers.size
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0] / numbers.size, 0.1, atol=0.005)
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.2


def test_debcse_weighs_surface_against_meaning():
    """Two candidates are drawn first as often as their weights say."""
    queries = 6000
    rows = np.tile([0, 1], (queries, 1))
    cosines, surface = np.array([0.2, 0.8]), np.array([0.6, 0.3])
    candidates = Candidates.of(
        rows, np.tile(cosines, (queries, 1)), np.full((queries, 1), 2), 3, surface=np.tile(surface, (queries, 1))
    )
    first = mine(candidates, [MINERS.build("debcse")], 1)[:, 0]
    weights = surface / ((1 + cosines) / 2)  # 1.0 and 1 / 3
    assert (first == 0).mean() == pytest.approx(weights[0] / weights.sum(), abs=0.02)
    assert shared_words("", "") == 0 and shared_words("Red BUS", "bus red") == 1
    with pytest.raises(MmembedError, match="search by cosine"):
        mine(candidates.rescored(candidates.scores * 9), [MINERS.build("debcse")], 1)


def test_positives_weigh_by_meaning_over_surface():
    some = np.array([[5, 6, -1]]), np.array([[0.6, 0.6, 0.0]]), np.array([[0]])
    candidates = Candidates.of(*some, 9, surface=np.array([[0.4, 0.0, 0.0]]))
    np.testing.assert_allclose(positive_weights(candidates), [[2.0, 8.0, 0.0]])
    with pytest.raises(MmembedError, match="have no surface; give it to Candidates.of"):
        positive_weights(Candidates.of(*some, 9))


def test_the_example_of_positives_on_the_page_of_mining(rng):
    page = (Path(__file__).parents[2] / "docs" / "mining.md").read_text(encoding="utf-8")
    code = page.split("## DebCSE's positives")[1].split("```python\n")[1].split("```")[0]
    vectors = rng.standard_normal((5, 8)).astype(np.float32)
    names = {"embedder": SimpleNamespace(encode=lambda sentences: vectors[: len(sentences)])}
    exec(code, names)
    assert names["weights"].shape == (5, 4) and (names["weights"] > 0).all()
    assert (names["positives"] != names["own"]).all() and (names["positives"] >= 0).all()


def test_stages_of_mcl(rng):
    """Clusters that are plain to see are found, and composites tell apart what any stage does."""
    centres = np.eye(4)[rng.integers(0, 4, 400)]
    vectors = (centres + 0.05 * rng.standard_normal((400, 4))) * rng.uniform(0.5, 2, (400, 1))
    stage = next_stage(vectors.astype(np.float32), seed=1, count=4)
    of = centres.argmax(axis=1)
    assert len({*zip(of.tolist(), stage.tolist(), strict=True)}) == len({*stage.tolist()}) >= 3
    joined = composite([stage, of], 4)
    assert len({*joined.tolist()}) == len({*zip(stage.tolist(), of.tolist(), strict=True)})
    with pytest.raises(MmembedError, match="10 clusters of 4 vectors"):
        next_stage(vectors[:4].astype(np.float32), seed=1)
    assert composite([np.array([9]), *[np.array([0])] * 17], 10)[0] == 9 * 10**17
    with pytest.raises(MmembedError, match="19 stages of 10 clusters exceed"):
        composite([stage] * 19, 10)
    with pytest.raises(MmembedError, match="they should be below 3"):
        composite([np.array([0, 3])], 3)
    vectors[5] = np.nan
    with pytest.raises(MmembedError, match="vector 5 holds NaN"):
        next_stage(vectors.astype(np.float32), seed=1, count=4)


# SaHa -----------------------------------------------------------------------------------------------------------------


def sampled_again(queries, documents, positive, negatives, multiple, labels):
    """SaHa as the paper's card tells it, on names and dictionaries, for one positive a query."""
    owners = {
        document: {query for query, own in enumerate(positive) if own == document} for document in range(len(documents))
    }
    used, clusters = set(), []
    for phase in (1, 2):
        taken = used if phase == 1 else set()
        limit = negatives * multiple * phase
        for query in range(len(queries)):
            if query in used:
                continue
            ranked = sorted(range(len(documents)), key=lambda one: (-float(queries[query] @ documents[one]), one))
            pool = [one for one in ranked[: 2 * negatives * multiple] if one != positive[query]]
            chosen = []
            for document in pool:
                free = sorted(owners[document] - taken - set(chosen))
                if free:
                    chosen.append(max(free, key=lambda one: (float(queries[query] @ queries[one]), -one)))
                if len(chosen) == limit:
                    break
            if not chosen:
                continue
            if not labels:
                chosen.sort(key=lambda one: float(queries[query] @ queries[one]))
            chosen = chosen[:negatives]
            clusters.append((query, chosen))
            used |= {query, *chosen}
            taken |= set(chosen)
        if not clusters:
            break
    return clusters


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 25),
    shared=st.booleans(),
    negatives=st.integers(1, 3),
    multiple=st.integers(1, 2),
    labels=st.booleans(),
)
def test_saha_against_the_card(seed, count, shared, negatives, multiple, labels):
    random = np.random.default_rng(seed)
    documents = max(2, count // 2 if shared else count)
    queries = random.integers(-3, 4, (count, 3)).astype(np.float32)  # exact products, ties
    corpus = random.integers(-3, 4, (documents, 3)).astype(np.float32)
    positive = random.integers(0, documents, count) if shared else random.permutation(count)
    rule = SelfAware(negatives, multiple, labels)
    depth = min(rule.depth, documents)
    candidates = retrieve(queries, corpus, positive[:, None], depth, similarity="dot", spare=False)
    made = rule.clusters(candidates, queries)
    assert [(one.query, one.owners.tolist()) for one in made] == sampled_again(
        queries, corpus, positive.tolist(), negatives, multiple, labels
    )
    for one in made:
        assert one.query not in one.owners and len({*one.owners.tolist()}) == len(one.owners) <= negatives
        assert [positive[owner] for owner in one.owners] == one.rows.tolist()
        assert positive[one.query] not in one.rows
    assert len({one.query for one in made}) == len(made)


def test_saha_leaves_the_most_similar_query_out():
    """Query 1 is nearly query 0, so its positive would answer query 0; among labels it is taken."""
    queries = np.array([[1, 0, 0], [0.99, 0.14, 0], [0.6, 0, 0.8]], np.float32)
    documents = np.array([[1, 0, 0], [0.9, 0.4, 0], [0.7, 0, 0.7]], np.float32)
    candidates = retrieve(queries, documents, np.array([[0], [1], [2]]), 3, similarity="dot", spare=False)
    assert SelfAware(1, 2).clusters(candidates, queries)[0].owners.tolist() == [2]
    assert SelfAware(1, 2, labels=True).clusters(candidates, queries)[0].owners.tolist() == [1]
    candidates = with_owners(candidates, queries, queries, candidates.positives, similarity="dot")
    assert mine(candidates, [OwnerSimilarity(2)], 1)[0].tolist() == [2]
    assert mine(candidates, [OwnerSimilarity(2, labels=True)], 1)[0].tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 20),
    documents=st.integers(3, 12),
    pool=st.integers(1, 6),
    labels=st.booleans(),
    first=st.integers(0, 5),
)
def test_owner_similarity_against_loops(seed, count, documents, pool, labels, first):
    random = np.random.default_rng(seed)
    every = random.integers(-3, 4, (first + count, 3)).astype(np.float32)  # exact products, ties
    corpus = random.integers(-3, 4, (documents, 3)).astype(np.float32)
    positives = np.where(random.random((first + count, 2)) < 0.8, random.integers(0, documents, (first + count, 2)), -1)
    queries = every[first:]
    found = retrieve(queries, corpus, positives[first:], documents - 2, similarity="dot")
    found = with_owners(found, queries, every, positives, first, similarity="dot")
    chosen = mine(found, [OwnerSimilarity(pool, labels)], 3)
    for query in range(count):
        owned = []
        for row, _ in listed(found, query):
            owners = [one for one in range(len(every)) if row in positives[one] and one != first + query]
            if owners:
                owned.append((max(float(every[one] @ queries[query]) for one in owners), row))
        owned = owned[:pool]
        expected = [row for _, row in (owned if labels else sorted(owned, key=lambda pair: pair[0]))][:3]
        assert [row for row in chosen[query].tolist() if row >= 0] == expected


def test_refusals_of_saha(rng):
    queries = rng.standard_normal((4, 3)).astype(np.float32)
    candidates = retrieve(queries, queries, np.arange(4)[:, None], 4, spare=False)
    with pytest.raises(MmembedError, match="for 4 queries"):
        SelfAware(1, 1).clusters(candidates, queries[:3])
    queries[2] = np.nan
    with pytest.raises(MmembedError, match="vector of query 2 holds NaN"):
        SelfAware(1, 1).clusters(candidates, queries)


# Retrieval and bad input ----------------------------------------------------------------------------------------------


def test_retrieval_goes_deeper_for_positives(rng):
    corpus = rng.standard_normal((40, 8)).astype(np.float32)
    queries, positives = corpus[:10], np.stack([np.arange(10), np.full(10, -1)], axis=1)
    candidates = retrieve(queries, corpus, positives, 5)
    similarities = queries @ corpus.T / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(corpus, axis=1))
    for query in range(10):
        expected = [row for row in np.argsort(-similarities[query]) if row != query][:5]
        assert candidates.rows[query].tolist() == expected
    np.testing.assert_allclose(candidates.positive_scores[:, 0], 1, atol=1e-6)
    assert np.isnan(candidates.positive_scores[:, 1]).all()


def test_retrieval_with_an_index(rng):
    pytest.importorskip("faiss")
    corpus = rng.standard_normal((40, 8)).astype(np.float32)
    positives = np.arange(10)[:, None]
    found = retrieve(corpus[:10], corpus, positives, 5, index=FaissIndex(corpus))
    np.testing.assert_array_equal(found.rows, retrieve(corpus[:10], corpus, positives, 5).rows)
    with pytest.raises(MmembedError, match="products are options of exact search"):
        retrieve(corpus[:10], corpus, positives, 5, index=FaissIndex(corpus), products="float32")


def test_bad_input(rng):
    corpus = rng.standard_normal((6, 4)).astype(np.float32)
    queries, positives = corpus[:2], np.array([[0], [1]])
    with pytest.raises(MmembedError, match="8 candidates beside 1 known positives of a corpus of 6; ask for 5 at most"):
        retrieve(queries, corpus, positives, 8)
    broken = corpus.copy()
    broken[4, 1] = np.nan
    with pytest.raises(MmembedError, match="row 4 of the corpus holds NaN"):
        retrieve(queries, broken, positives, 3)
    with pytest.raises(MmembedError, match="give .Q, P."):
        retrieve(queries, corpus, np.array([0, 1]), 3)
    candidates = retrieve(queries, corpus, positives, 3)
    with pytest.raises(MmembedError, match="7 negatives of a corpus of 6"):
        mine(candidates, [], 7)
    with pytest.raises(MmembedError, match="ask for 1 at least"):
        mine(candidates, [], 0)
    nobody = retrieve(queries, corpus, np.array([[0], [-1]]), 3)
    with pytest.raises(MmembedError, match="query 1 has no known positive"):
        mine(nobody, [MINERS.build("percent_of_positive")], 2)
    with pytest.raises(ConfigError, match="both pick the negatives"):
        mine(candidates, [MINERS.build("random"), MINERS.build("top_k")], 2)
    for block, said in (
        ({"type": "threshold"}, "without most or least"),
        ({"type": "threshold", "most": 0.1, "least": 0.2}, "nothing would be left"),
        ({"type": "rank_window", "first": 5, "last": 5}, "nothing would be left"),
        ("percent_of_positiv", "did you mean 'percent_of_positive'"),
    ):
        with pytest.raises(ConfigError, match=said):
            MINERS.build(block)
    rows, scores = np.array([[1, 2]]), np.array([[0.5, 0.4]])
    for changed, said in (
        ({"scores": np.array([[0.5, np.nan]])}, r"a candidate of query 0 \(row 2\) is nan"),
        ({"rows": np.array([[1, 6]])}, "rows 1 to 6 of a corpus of 6"),
        ({"scores": scores[:, :1]}, "scores of shape"),
        ({"positive_scores": np.array([[np.inf]])}, "a positive of query 0"),
        ({"contents": np.arange(5)}, "contents of shape"),
    ):
        given = {"rows": rows, "scores": scores, "positives": np.array([[0]]), "corpus": 6} | changed
        with pytest.raises(MmembedError, match=said):
            Candidates.of(**given)
