"""The tables of MMEB and MRB against what others published: names, counts, revisions, a model's averages by group."""

import json
import re
from collections import Counter
from pathlib import Path

import mteb
import pytest

from eval.files import read_json
from eval.mmeb import LABELS
from eval.tasks import mmeb, mrb

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
    counted = {one.name: one.queries for one in mmeb.V2 if one.modality != "image"}
    assert counted == GOLDEN["queries"] and {one.queries for one in mmeb.V1} == {1000}
    ours = {one.name: one.candidates for one in mmeb.V2}
    assert {name: ours[name] for name in GOLDEN["candidates"]} == GOLDEN["candidates"]
    labels = read_json(LABELS)
    assert {name: len(set(own)) for name, own in labels.items()} == {name: ours[name] for name in labels}


def test_counts_are_those_of_the_papers_unless_a_reason_is_given():
    """An exception without a difference fails, too."""
    tables, sets = GOLDEN["tables"], {one.name: one for one in mmeb.V2}
    unlike = {name for name, candidates in tables["image"].items() if sets[name].candidates != candidates}
    unlike |= {name for name, counts in tables["video"].items()
               if [sets[name].queries, sets[name].candidates] != counts}  # fmt: skip
    for group, ranges in tables["document"].items():
        own = [one for one in mmeb.V2 if group in (one.group, one.name)]
        sides = ([one.queries for one in own], [one.candidates for one in own])
        unlike |= {group for counts, found in zip(sides, ranges, strict=True) if [min(counts), max(counts)] != found}
    assert unlike == set(GOLDEN["unlike"])
    assert set(tables["image"]) | set(tables["video"]) == {one.name for one in mmeb.V2 if one.modality != "document"}
    assert {one.name for one in mmeb.V2 if one.candidates is None} == {
        "MVBench", "MomentSeeker", "ViDoSeek-page", "MMLongBench-page"
    }  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN["mteb"])
def test_corpora_of_pages_are_as_mteb_counts_them(name):
    """Of a set in several languages mteb lists the corpus once for each."""
    (one,) = (one for one in mmeb.V2 if one.name == name)
    (split,) = mteb.get_task(GOLDEN["mteb"][name]).metadata.descriptive_stats.values()
    parts = list(split.get("hf_subset_descriptive_stats", {"all": split}).values())
    asked = [(part.get("queries_text_statistics") or part["queries_statistics"])["unique_texts"] for part in parts]
    assert sum(asked) == one.queries
    pages = {part["num_samples"] - queries for part, queries in zip(parts, asked, strict=True)}
    assert pages == {one.candidates}


def test_revisions_are_pinned_and_where_none_was_found_that_is_known():
    pinned = {one.repository: one.revision for one in mmeb.V2 if one.revision}
    assert pinned == GOLDEN["revisions"]
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in (*pinned.values(), mmeb.MEDIA_REVISION))
    assert {one.repository for one in mmeb.V2 if not one.revision} == set(GOLDEN["unpinned"])
    theirs = [mteb.get_task(name).metadata.dataset for name in GOLDEN["mteb"].values()]
    same = [data for data in theirs if data["path"] in pinned]  # of the others mteb reads copies of its own
    assert len(same) == 5 and all(pinned[data["path"]] == data["revision"] for data in same)


def test_every_task_of_mrb_is_pinned_by_mteb():
    for task in (row.name for one in mrb.SETS for row in one.rows):
        assert re.fullmatch("[0-9a-f]{40}", mteb.get_task(task).metadata.dataset["revision"]), task


def test_metrics_and_kinds():
    assert {one.main_score for one in mmeb.V2 if one.modality == "document"} == {"ndcg_at_5"}
    assert {one.main_score for one in mmeb.V2 if one.modality != "document"} == {"hit_rate_at_1"}
    whole = {one.name for one in mmeb.V2 if one.kind == "retrieval" and one.modality == "video"}
    assert whole == {"K700", "HMDB51", "UCF101", "Breakfast", "MSR-VTT", "MSVD", "DiDeMo", "VATEX", "YouCook2"}
