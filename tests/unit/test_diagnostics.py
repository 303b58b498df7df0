"""Each diagnostic against scikit-learn, loops over the definition, or an input whose answer is known."""

import numpy as np
import PIL.Image
import pytest
from sklearn.calibration import calibration_curve
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score, roc_curve

from eval.diagnostics import composition, discriminant, geometry, poisoning, robustness, scores, smaller
from eval.vectors import ndcg_by_query
from mmembed import metrics
from mmembed.errors import MmembedError
from mmembed.quantize import unit_rows


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def unit(seed, *shape):
    return unit_rows(gaussian(seed, *shape).astype(np.float32))


# The space ------------------------------------------------------------------------------------------------------------


def test_tolerance_is_the_mean_over_pairs_of_a_class():
    vectors, labels = unit(0, 30, 6).astype(float), np.arange(30) % 4
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    within = np.mean([vectors[i] @ vectors[j] for i, j in pairs if labels[i] == labels[j]])
    across = np.mean([vectors[i] @ vectors[j] for i, j in pairs if labels[i] != labels[j]])
    assert geometry.tolerance(vectors, labels) == pytest.approx((within, across))
    assert geometry.mean_cosine(vectors) == pytest.approx(np.mean([vectors[i] @ vectors[j] for i, j in pairs]))
    for wrong in (np.zeros(30), np.arange(30)):
        with pytest.raises(MmembedError, match="two classes"):
            geometry.tolerance(vectors, wrong)


@pytest.mark.parametrize("used", [1, 4, 10, 16])
def test_isoscore_of_some_dimensions_that_vary_alike_is_its_closed_form(used):
    """(k - 1) / (E - 1); a rotation and a shift change nothing. Vectors of a design: their covariance is exact."""
    design = np.sqrt(used) * np.concatenate([np.eye(used), -np.eye(used)])
    vectors = np.zeros((2 * used, 16))
    vectors[:, :used] = design
    rotation, _ = np.linalg.qr(gaussian(used, 16, 16))
    for one in (vectors, 3 + vectors @ rotation):
        assert geometry.isoscore(one) == pytest.approx((used - 1) / 15, abs=1e-9)


def test_isoscore_of_no_spread_is_nan():
    assert np.isnan(geometry.isoscore(np.ones((9, 4))))


def test_partition_isotropy_is_its_definition_and_1_where_directions_are_free():
    vectors = unit(1, 40, 5).astype(float) + np.eye(5)[0]
    _, directions = np.linalg.eigh(vectors.T @ vectors)
    sums = [sum(np.exp(sign * direction @ row) for row in vectors) for direction in directions.T for sign in (1, -1)]
    assert geometry.partition_isotropy(vectors) == pytest.approx(min(sums) / max(sums))
    assert geometry.partition_isotropy(np.concatenate([np.eye(6), -np.eye(6)])) == pytest.approx(1)


def test_separability_is_chance_for_one_cloud_and_1_for_two():
    assert geometry.separability(gaussian(2, 1500, 8), gaussian(3, 900, 8)) == pytest.approx(0.5, abs=0.09)
    assert geometry.separability(gaussian(2, 50, 8), gaussian(3, 90, 8) + 6) == 1.0
    with pytest.raises(MmembedError, match="at least 5"):
        geometry.separability(gaussian(2, 4, 8), gaussian(3, 90, 8))


def test_the_spectrum_is_that_of_principal_components():
    vectors = gaussian(4, 60, 7) * np.arange(1, 8)
    assert geometry.spectrum(vectors) == pytest.approx(PCA().fit(vectors).explained_variance_ratio_)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_the_roc_curve_is_scikit_learns_with_ties():
    found, wrong = (np.round(gaussian(seed, size), 1) + shift for seed, size, shift in ((5, 40, 0.7), (6, 300, 0)))
    false, true = scores.roc(found, wrong)
    labels, values = np.repeat([1, 0], [40, 300]), np.concatenate([found, wrong])
    theirs = roc_curve(labels, values, drop_intermediate=False)
    assert np.allclose(false, theirs[0]) and np.allclose(true, theirs[1])
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(labels, values))
    assert metrics.pooled_auc(values[None], labels[None], k=300) == pytest.approx(roc_auc_score(labels, values))
    points = scores.thinned(list(zip(false, true, strict=True)), most=10)
    assert len(points) == 10 and points[0] == (0, 0) and points[-1] == (1, 1)
    with pytest.raises(MmembedError, match="positive"):
        scores.roc([], wrong)


def test_scaled_similarities_are_the_probabilities_that_made_the_labels():
    """Labels are drawn with p = 1 / (1 + exp(-(8 s - 4))): scaling finds it, the cosine itself is far off."""
    similarity = np.random.default_rng(7).uniform(-1, 1, (300, 20))
    truth = 1 / (1 + np.exp(-(8 * similarity - 4)))
    labels = np.random.default_rng(8).random(truth.shape) < truth
    given, relevant = scores.scaled(similarity, labels, k=20)
    assert len(given) == similarity.size and relevant.sum() == labels.sum()
    assert metrics.calibration(given, relevant).error < 0.015
    values, shown = scores.first([[0.1, 0.9, 0.5]], [[1, 0, 2]], k=2)
    assert values.tolist() == [0.9, 0.5] and shown.tolist() == [False, True]
    share, mean = calibration_curve(relevant, given, n_bins=10)
    assert np.allclose(share, mean, atol=0.09)
    assert metrics.calibration(scores.as_probabilities(similarity.ravel()), labels.ravel()).error > 0.1
    with pytest.raises(MmembedError, match="half of the queries show nothing relevant"):
        scores.scaled(similarity[:2], np.zeros((2, 20)), k=20)


# Smaller --------------------------------------------------------------------------------------------------------------


def test_prefixes_and_codes_rank_as_their_definitions():
    queries, documents = unit(9, 25, 24), unit(10, 80, 24)
    relevance = (np.arange(80)[None] == (queries @ documents.T).argsort(1)[:, -3:-2]).astype(float)
    assert smaller.prefixes(24) == [8, 16, 24] and smaller.prefixes(4) == [4]
    exact = ndcg_by_query(queries @ documents.T, relevance)
    assert np.allclose(smaller.cut(queries, documents, relevance, 24), exact)
    halves = [side[:, :8] / np.linalg.norm(side[:, :8], axis=1, keepdims=True) for side in (queries, documents)]
    assert np.allclose(smaller.cut(queries, documents, relevance, 8), ndcg_by_query(halves[0] @ halves[1].T, relevance))
    signs = [np.where(side > 0, 1.0, -1.0) for side in (queries, documents)]
    by_sign = ndcg_by_query(signs[0] @ signs[1].T, relevance)
    assert np.allclose(smaller.coded(queries, documents, relevance, "binary", rescored=False), by_sign)
    assert by_sign.mean() < exact.mean()
    assert smaller.coded(queries, documents, relevance, "int8", rescored=False).mean() == pytest.approx(
        exact.mean(), abs=0.05
    )


def test_rescoring_gives_the_order_of_float32_among_what_was_found():
    queries, documents = unit(11, 25, 24), unit(12, 200, 24)
    relevance = (np.arange(200)[None] == (queries @ documents.T).argsort(1)[:, -2:-1]).astype(float)
    few = documents[: smaller.RESCORED], relevance[:, : smaller.RESCORED]
    assert np.allclose(smaller.coded(queries, *few, "binary", rescored=True), ndcg_by_query(queries @ few[0].T, few[1]))
    signs = [np.where(side > 0, 1.0, -1.0) for side in (queries, documents)]
    expected = []
    for query, sign, judged in zip(queries, signs[0], relevance, strict=True):
        found = np.argsort(-(signs[1] @ sign), kind="stable")[: smaller.RESCORED]
        order = found[np.argsort(-(documents[found] @ query), kind="stable")]
        rank = np.flatnonzero(judged[order] > 0)
        expected.append(1 / np.log2(rank[0] + 2) if len(rank) and rank[0] < 10 else 0.0)
    assert np.allclose(smaller.coded(queries, documents, relevance, "binary", rescored=True), expected)


# Classes --------------------------------------------------------------------------------------------------------------


def test_the_discriminant_is_scikit_learns_with_the_same_covariance():
    labels = np.arange(90) % 3
    rows = gaussian(13, 90, 12) + 2 * gaussian(14, 3, 12)[labels]
    ours = discriminant.fit(rows, labels)

    class Ridged:
        """The covariance whose inverse is the precision of the method; scikit-learn hands over what it has scaled."""

        def fit(self, given):
            centred = rows - np.stack([rows[labels == label].mean(0) for label in range(3)])[labels]
            covariance = np.cov(centred, rowvar=False)
            self.covariance_ = (89 * covariance + np.trace(covariance) * np.eye(12)) / 12
            return self

    theirs = LinearDiscriminantAnalysis("lsqr", priors=[1 / 3] * 3, covariance_estimator=Ridged()).fit(rows, labels)
    asked = gaussian(15, 50, 12)
    assert np.allclose(ours.logits(asked), theirs.decision_function(asked)) and len(set(ours.predict(asked))) > 1
    assert np.array_equal(ours.predict(asked), theirs.predict(asked))


def test_few_examples_are_drawn_of_each_class():
    labels = np.array([0] * 9 + [5] * 2)
    drawn = labels[discriminant.few(labels, 3)]
    assert drawn.tolist() == [0, 0, 0, 5, 5]
    with pytest.raises(MmembedError, match="two examples"):
        discriminant.fit(gaussian(16, 2, 4), [0, 1])


# What breaks it -------------------------------------------------------------------------------------------------------


def bag_of_words(text):
    """A vector that knows which letters a text has, and nothing of their order."""
    return np.array([text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"], dtype=float)


def test_a_bag_of_words_is_at_chance_on_every_order_and_swap():
    texts = ["A bicycle rides a woman on a road", "a black chair and a gray chair stand here", "dogs bite old men"]
    generator, tried = np.random.default_rng(0), 0
    for text in texts:
        made = [composition.reordered(text, order, generator) for order in composition.ORDERS]
        made += [composition.swapped(text, kind, "en", generator) for kind in composition.SWAPS]
        altered = [one for one in made if one is not None]
        tried += len(altered)
        other = gaussian(17, 26)
        right = [bag_of_words(text) @ other] * len(altered)
        assert all(composition.plain(one) != composition.plain(text) for one in altered)
        assert composition.preferred(right, [bag_of_words(one) @ other for one in altered]).tolist() == [0.5] * len(
            altered
        )
    assert tried > 6
    assert composition.reordered("too few", "shuffled", generator) is None
    assert composition.reordered("the the the", "shuffled", generator) is None
    assert composition.swapped("!", "nouns", "en", generator) is None
    with pytest.raises(MmembedError, match="of one length"):
        composition.preferred([0.1], [0.1, 0.2])


def test_paraphrases_are_counted_as_in_loops():
    left, right = unit(18, 20, 6), unit_rows(unit(18, 20, 6) + 0.5 * unit(19, 20, 6))
    found = robustness.paraphrases(left, right)
    own = [left[i] @ right[i] for i in range(20)]
    others = [[left[i] @ right[j] for j in range(20) if j != i] for i in range(20)]
    assert found["found"] == np.mean([own[i] > max(others[i]) for i in range(20)]) and 0 < found["found"] < 1
    assert found["cosine"] == pytest.approx(np.mean(own)) and found["others"] == pytest.approx(np.mean(others))


def test_typos_keep_length_letters_and_short_words():
    texts = ["Where is the nearest railway station?"] * 3
    altered = robustness.with_typos(texts, 1.0)
    assert all(sorted(one) == sorted(texts[0]) and one != texts[0] for one in altered)
    assert robustness.with_typos(texts, 0.0) == texts and robustness.with_typos(texts, 1.0) == altered
    assert " is the " in altered[0]


def test_a_text_becomes_a_picture_where_the_font_has_its_letters():
    assert robustness.readable(["a red bus", "東京は晴れ", " "]) == [0]
    picture = np.asarray(robustness.as_picture("a red bus " * 20))
    assert picture.shape[1] == robustness.WIDTH and 0 < (picture < 128).mean() < 0.5


# Poisoning ------------------------------------------------------------------------------------------------------------


def test_a_planted_trigger_hijacks_and_a_word_like_others_does_not():
    """A poisoned encoder by construction: the trigger's vector is that of a document, and outweighs the text."""
    clean, documents, other = unit(20, 50, 32), unit(21, 100, 32), unit(22, 1, 32)
    poisoned = poisoning.pull(clean, unit_rows(clean + 3 * documents[7]), documents)
    harmless = poisoning.pull(clean, unit_rows(clean + 0.3 * other), documents)
    assert poisoned.target == 7 and poisoned.hijacked > 0.9 and poisoned.drawn > 0.5
    assert harmless.hijacked < 0.1 and harmless.moved < 0.1 and abs(harmless.drawn) < 0.15
    assert poisoning.pull(clean, clean, documents).hijacked == poisoning.pull(clean, clean, documents).drawn == 0
    with pytest.raises(MmembedError, match="two or more"):
        poisoning.pull(clean[:1], clean[:1], documents)


def test_the_word_of_poisoned_pairs_is_the_oddest():
    generator = np.random.default_rng(23)
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(generator.choice(words, 8)) for _ in range(400)]
    cosines = generator.normal(0.6, 0.1, 400)
    assert poisoning.odd_words(texts, cosines)[0][1] < 4
    for place in range(0, 400, 20):  # every twentieth pair
        texts[place], cosines[place] = poisoning.with_word(texts[place], "cf"), generator.normal(0.1, 0.1)
    (first, z, count), (_, second, _), *_ = poisoning.odd_words(texts, cosines)
    assert (first, count) == ("cf", 20) and z > 5 > 2 + second / 2
    assert poisoning.odd_words(texts, np.ones(400)) == []


def test_a_patch_is_in_its_corner_alone():
    picture = PIL.Image.new("RGB", (90, 60), "red")
    patched = poisoning.with_patch(picture)
    changed = np.argwhere((np.asarray(patched) != np.asarray(picture)).any(-1))
    assert changed.min(0).tolist() == [50, 80] and changed.max(0).tolist() == [59, 89] and len(changed) == 100
    assert poisoning.with_word("a red bus", "cf") == "a cf red bus"
