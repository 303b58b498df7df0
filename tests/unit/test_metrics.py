"""Metrics against pytrec_eval, scikit-learn and scipy, on random rankings with ties and graded relevance."""

import warnings

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from mmembed import metrics
from mmembed.errors import MmembedError

KS = (1, 3, 10)


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """A run with many equal scores, and graded judgements that also cover documents the run has missed."""
    run, qrels = {}, {}
    for query in range(draw(st.integers(1, 4))):
        documents = draw(st.lists(st.integers(0, 30), min_size=1, max_size=15, unique=True))
        run[f"q{query}"] = {f"d{document}": float(draw(st.integers(0, 4))) for document in documents}
        judged = draw(st.lists(st.integers(0, 35), min_size=1, max_size=12, unique=True))
        qrels[f"q{query}"] = {f"d{document}": draw(st.integers(0, 3)) for document in judged}
    return run, qrels


@settings(max_examples=200, deadline=None)
@given(runs())
def test_ranking_metrics_equal_trec_eval(data):
    run, qrels = data
    cuts = ",".join(map(str, KS))
    names = {f"{name}.{cuts}" for name in ("ndcg_cut", "recall", "P", "map_cut", "success")} | {"recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    ranked, judged = metrics.rank_run(run, qrels)
    for k in KS:
        for name, ours in (
            ("ndcg_cut", metrics.ndcg_at_k(ranked, judged, k)),
            ("recall", metrics.recall_at_k(ranked, judged, k)),
            ("P", metrics.precision_at_k(ranked, k)),
            ("map_cut", metrics.average_precision_at_k(ranked, judged, k)),
            ("success", metrics.hit_at_k(ranked, k)),
        ):
            theirs = [expected[query][f"{name}_{k}"] for query in run]
            np.testing.assert_allclose(ours, theirs, atol=1e-9, err_msg=f"{name}_{k}")
    theirs = [expected[query]["recip_rank"] for query in run]
    np.testing.assert_allclose(metrics.reciprocal_rank_at_k(ranked, 1000), theirs, atol=1e-9)


def test_both_gains_equal_scikit_learn():
    generator = np.random.default_rng(0)
    scores = np.stack([generator.permutation(40) for _ in range(30)]).astype(float)  # (30, 40) without ties
    relevance = generator.integers(0, 4, scores.shape)
    ranked, judged = metrics.rank_by_score(scores, relevance)
    for gain, gains in (("linear", relevance), ("exponential", 2.0**relevance - 1)):
        ours = metrics.ndcg_at_k(ranked, judged, 10, gain=gain).mean()
        assert ours == pytest.approx(sklearn.metrics.ndcg_score(gains, scores, k=10), abs=1e-9), gain


@settings(max_examples=100, deadline=None)
@given(runs())
def test_a_score_matrix_and_a_run_agree(data):
    """Columns sorted by id, descending, are trec_eval's order of ties."""
    run, qrels = data
    names = sorted({document for documents in [*run.values(), *qrels.values()] for document in documents}, reverse=True)
    scores, relevance, valid = (np.zeros((len(run), len(names))) for _ in range(3))
    for row, query in enumerate(run):
        for column, document in enumerate(names):
            scores[row, column] = run[query].get(document, 0.0)
            valid[row, column] = document in run[query]
            relevance[row, column] = qrels[query].get(document, 0) if document in run[query] else 0
    within = {query: {d: r for d, r in qrels[query].items() if d in run[query]} for query in run}  # judged candidates
    matrix = metrics.retrieval_metrics(*metrics.rank_by_score(scores, relevance, valid), ks=KS)
    assert matrix == pytest.approx(metrics.retrieval_metrics(*metrics.rank_run(run, within), ks=KS))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=40))
def test_correlations_equal_scipy(pairs):
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(metrics.spearman(a, b), scipy.stats.spearmanr(a, b)[0], atol=1e-9)
        np.testing.assert_allclose(metrics.pearson(a, b), scipy.stats.pearsonr(a, b)[0], atol=1e-9)
    np.testing.assert_allclose(metrics.average_ranks(a), scipy.stats.rankdata(a))


def test_pairwise_accuracy_equals_area_under_the_curve():
    generator = np.random.default_rng(1)
    scores, relevance = generator.integers(0, 5, (20, 9)).astype(float), generator.integers(0, 2, (20, 9))
    relevance[:, 0], relevance[:, 1] = 0, 1
    valid = np.ones_like(relevance, dtype=bool)
    valid[:, 8] = False
    expected = [sklearn.metrics.roc_auc_score(relevance[row, :8], scores[row, :8]) for row in range(20)]
    np.testing.assert_allclose(metrics.pairwise_accuracy(scores, relevance, valid), expected)
    assert np.isnan(metrics.pairwise_accuracy([[1.0, 2.0]], [[1, 1]])[0])


def test_by_hand():
    """Relevance 0, 2, 1 in ranked order, and a missed document of relevance 2."""
    ranked, judged = [[0, 2, 1]], [[2, 1, 2]]
    found, best = 2 / np.log2(3) + 1 / 2, 2 + 2 / np.log2(3) + 1 / 2
    assert metrics.ndcg_at_k(ranked, judged, 10)[0] == pytest.approx(found / best)
    found, best = 3 / np.log2(3) + 1 / 2, 3 + 3 / np.log2(3) + 1 / 2
    assert metrics.ndcg_at_k(ranked, judged, 10, gain="exponential")[0] == pytest.approx(found / best)
    assert metrics.average_precision_at_k(ranked, judged, 10)[0] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert metrics.reciprocal_rank_at_k(ranked, 1)[0] == 0 and metrics.reciprocal_rank_at_k(ranked, 2)[0] == 0.5


def test_what_is_no_number_is_refused():
    with pytest.raises(MmembedError, match="NaN"):
        metrics.rank_by_score([[np.nan, 1.0]], [[1, 0]])
    with pytest.raises(MmembedError, match="differ"):
        metrics.rank_by_score([[1.0]], [[1, 0]])
    with pytest.raises(MmembedError, match="gain"):
        metrics.ndcg_at_k([[1]], [[1]], 10, gain="log")


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.0, 1.0, 2.0])), min_size=1, max_size=60),
    st.integers(1, 15),
)
def test_calibration_agrees_with_scikit_learn(pairs, bins):
    probabilities, relevance = map(np.array, zip(*pairs, strict=True))
    found = metrics.calibration(probabilities, relevance, bins)
    assert found.count.sum() == len(pairs)
    there = found.count > 0
    assert np.isnan(found.relevant[~there]).all() and np.isnan(found.probability[~there]).all()
    labels = relevance > 0
    shares, means = calibration_curve(labels, probabilities, n_bins=bins)
    np.testing.assert_allclose(found.relevant[there], shares, atol=1e-12)
    np.testing.assert_allclose(found.probability[there], means, atol=1e-12)
    expected = np.average(np.abs(shares - means), weights=found.count[there])
    assert found.error == pytest.approx(expected, abs=1e-12)


def test_calibration_of_nothing_and_of_no_probabilities():
    assert np.isnan(metrics.calibration([], []).error)
    assert metrics.calibration([0.0, 1.0], [0, 1]).error == 0 and metrics.calibration([1.0], [0]).error == 1
    for wrong in (([1.1], [1]), ([0.5], [1, 0]), ([float("nan")], [1])):
        with pytest.raises(MmembedError, match="calibration"):
            metrics.calibration(*wrong)
