"""Intervals and paired tests against scipy, closed forms, and simulations of which the truth is known."""

import numpy as np
import pytest
import scipy.stats

from eval.significance import exchange_test, holm, interval, interval_of_means, paired, score
from mmembed.errors import MmembedError


def draws(seed, *shape):
    return np.random.default_rng(seed).random(shape)


@pytest.mark.parametrize("rows", [40, 333])
def test_the_interval_of_a_mean_is_scipys(rows):
    values = draws(rows, rows) ** 3
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    low, high = interval(values)
    error = values.std() / rows**0.5
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * error)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * error)


def test_the_interval_of_a_correlation_is_scipys_with_ties():
    gold = np.round(5 * draws(1, 120))  # six grades
    rows = np.stack([gold + 3 * draws(2, 120), gold], axis=1)
    spearman = scipy.stats.spearmanr(*rows.T).statistic
    assert score(rows, "spearman") == pytest.approx(spearman, abs=1e-12)
    theirs = scipy.stats.bootstrap(
        tuple(rows.T), lambda x, y: scipy.stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        method="percentile", n_resamples=4000, rng=1,
    )  # fmt: skip
    low, high = interval(rows, "spearman")
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.01)


def test_the_interval_holds_the_truth_in_about_95_of_100_samples():
    """Of 400 samples of 80 values with mean 1/3; three standard errors of that share are 3.3 %."""
    generator, held = np.random.default_rng(3), 0
    for _ in range(400):
        low, high = interval(generator.random(80) ** 2, samples=1000)
        held += low <= 1 / 3 <= high
    assert held / 400 == pytest.approx(0.95, abs=0.033)


def test_the_paired_interval_holds_the_truth_in_about_95_of_100_samples():
    generator, held = np.random.default_rng(4), 0
    for _ in range(300):
        theirs = generator.random(80)
        found = paired(theirs + generator.normal(0.05, 0.2, 80), theirs, samples=1000)
        held += found.low <= 0.05 <= found.high
    assert held / 300 == pytest.approx(0.95, abs=0.038)


def test_the_test_gives_a_false_alarm_in_about_5_of_100_samples():
    generator, alarms = np.random.default_rng(5), 0
    for _ in range(400):
        alarms += exchange_test(generator.random(60), generator.random(60), samples=500) < 0.05
    assert alarms / 400 == pytest.approx(0.05, abs=0.033)


def test_the_test_of_means_is_scipys():
    a, b = draws(6, 70), draws(7, 70) * 0.9
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=20_000, rng=1
    )
    assert exchange_test(a, b) == pytest.approx(theirs.pvalue, abs=0.01)
    assert paired(a, b).difference == pytest.approx((a - b).mean())


def test_the_test_of_few_rows_is_exact():
    a, b = draws(8, 9), draws(9, 9) - 0.2
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert exchange_test(a, b) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_the_test_of_correlations_exchanges_ranks():
    gold = np.round(5 * draws(10, 60))
    sides = [gold + 4 * draws(11, 60), gold + 9 * draws(12, 60)]
    ranks = [scipy.stats.rankdata(side) for side in sides]

    def difference(x, y):
        return scipy.stats.spearmanr(x, gold).statistic - scipy.stats.spearmanr(y, gold).statistic

    theirs = scipy.stats.permutation_test(
        tuple(ranks), difference, permutation_type="samples", n_resamples=1500, vectorized=False, rng=1
    )
    ours, others = (np.stack([side, gold], axis=1) for side in sides)
    assert exchange_test(ours, others, "spearman") == pytest.approx(theirs.pvalue, abs=0.04)
    found = paired(ours, others, "spearman")
    assert found.difference == pytest.approx(difference(*sides)) and found.low < found.difference < found.high


def test_one_scale_or_another_of_the_cosines_changes_no_test():
    gold = np.round(5 * draws(13, 40))
    a, b = np.stack([draws(14, 40), gold], axis=1), np.stack([draws(15, 40), gold], axis=1)
    assert paired(a * [0.01, 1], b, "spearman") == paired(a, b, "spearman")


def test_the_mean_of_several_tasks_is_scipys():
    tasks = [draws(16, 50).tolist(), draws(17, 90).tolist()]
    theirs = scipy.stats.bootstrap(
        tasks, lambda x, y, axis: (x.mean(axis=axis) + y.mean(axis=axis)) / 2, method="percentile", rng=1
    ).confidence_interval
    assert interval_of_means(tasks) == pytest.approx((theirs.low, theirs.high), abs=3e-3)


def test_the_mean_of_several_tasks_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(0.05, 0.2, 400), rng.normal(0.01, 0.4, 100)]
    low, high = interval_of_means(tasks)
    mean = sum(task.mean() for task in tasks) / 2
    error = sum(task.var() / len(task) for task in tasks) ** 0.5 / 2
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert interval_of_means([[0.0] * 9]) is None and interval_of_means([[0.1]]) is None


def test_holm_steps_down():
    """scipy has Benjamini-Hochberg alone: the definition, as loops."""
    p = {str(number): float(value) for number, value in enumerate(draws(18, 12) ** 3)}
    ordered = sorted(p.values())
    for name, value in p.items():
        expected = max(min(1.0, (12 - rank) * ordered[rank]) for rank in range(ordered.index(value) + 1))
        assert holm(p)[name] == pytest.approx(expected)


def test_what_has_no_interval_and_what_is_refused():
    assert (
        interval([0.5]) is None and interval([0.5] * 9) is None and interval([[0.1, 3], [0.2, 3]], "spearman") is None
    )
    with pytest.raises(MmembedError, match="not those of one task"):
        paired([0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(MmembedError, match="not those of one task"):
        paired([[0.1, 1], [0.2, 2]], [[0.1, 1], [0.2, 3]], "spearman")
    with pytest.raises(MmembedError, match=r"give \(N, 2\)"):
        score([0.1, 0.2], "spearman")


def test_the_same_seed_gives_the_same_numbers():
    values = draws(19, 100)
    assert interval(values) == interval(values) and paired(values, values).p == 1.0
