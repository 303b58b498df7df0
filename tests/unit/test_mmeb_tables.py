"""MMEB's tables against what others published: names, counts, groups, and averages of a model's scores by group."""

import json
from collections import Counter
from pathlib import Path

import pytest

from eval.files import read_json
from eval.mmeb import LABELS
from eval.tasks import mmeb

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/mmeb.json").read_text())
UNLIKE = {"image retrieval": 0.16, "image grounding": 0.101}  # there the two publications differ by more than rounding
SCORES = {name: score for scores in GOLDEN["scores"].values() for name, score in scores.items()}


def test_the_sets_are_those_of_the_leaderboard():
    for modality, scores in GOLDEN["scores"].items():
        assert {one.name for one in mmeb.V2 if one.modality == modality} == set(scores)
    assert {one.name for one in mmeb.V1} == set(GOLDEN["scores"]["image"])
    assert (len(mmeb.V1), len(mmeb.V2)) == (36, 78)


@pytest.mark.parametrize("group", GOLDEN["groups"])
def test_published_averages_are_those_of_our_groups(group):
    """A set in a wrong group would move two averages away from the published ones."""
    sets, published = GOLDEN["groups"][group]
    own = [SCORES[one.name] for one in mmeb.V2 if group in (one.group, *one.overall)]
    assert len(own) == sets
    assert sum(own) / sets == pytest.approx(published, abs=UNLIKE.get(group, 0.051))


def test_domains_are_those_of_the_training_part():
    assert {one.name for one in mmeb.V1 if one.in_domain} == set(GOLDEN["in_domain"])
    assert Counter(one.in_domain for one in mmeb.V1) == {True: 20, False: 16}
    assert {one.in_domain for one in mmeb.V2 if one.modality != "image"} == {None}


def test_counts_of_queries_and_candidates():
    counted = {one.name: one.queries for one in mmeb.V2 if one.modality == "video"}
    assert counted == GOLDEN["queries"] and {one.queries for one in mmeb.V1} == {1000}
    ours = {one.name: one.candidates for one in mmeb.V2}
    assert {name: ours[name] for name in GOLDEN["candidates"]} == GOLDEN["candidates"]
    labels = read_json(LABELS)
    assert {name: len(set(own)) for name, own in labels.items()} == {name: ours[name] for name in labels}


def test_metrics_and_kinds():
    assert {one.main_score for one in mmeb.V2 if one.modality == "document"} == {"ndcg_at_5"}
    assert {one.main_score for one in mmeb.V2 if one.modality != "document"} == {"hit_rate_at_1"}
    whole = {one.name for one in mmeb.V2 if one.kind == "retrieval" and one.modality == "video"}
    assert whole == {"K700", "HMDB51", "UCF101", "Breakfast", "MSR-VTT", "MSVD", "DiDeMo", "VATEX", "YouCook2"}
