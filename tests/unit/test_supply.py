"""What an objective needs of its data is asked when they were read: in the source's name, with its first record."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from mmembed.config import build_config
from mmembed.config.blocks import RerankerConfig, SourceConfig
from mmembed.content import Document, Text
from mmembed.data.census import Census, held
from mmembed.data.dataset import RecordDataset
from mmembed.data.streaming import RecordStream
from mmembed.errors import ConfigError, RecordError
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources
from mmembed.training.health import look_at
from mmembed.training.supply import shortages
from tests.unit.test_objective_memory import batch, step

NUMBERS = itertools.count()


def record(*documents, task="retrieval"):
    """Documents as (relevance, score), or relevance alone."""
    pairs = [one if isinstance(one, tuple) else (one, None) for one in documents]
    keys = [
        {"content": f"document {place}", "relevance": relevance, **({} if score is None else {"score": score})}
        for place, (relevance, score) in enumerate(pairs)
    ]
    number = next(NUMBERS)
    for one in keys:
        one["content"] += f" of {number}"
    return {"query": f"query {number}", "documents": keys, "task": task}


def read(tmp_path, records, objective, train=None, batch_size=8, training=None, **data):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    source = {"path": str(path), "name": "some", **(train or {})}
    tree = {"data": {"train": [source], "train_group_size": 4, **data}, "objective": objective}
    config = build_config({**tree, "training": {"per_device_train_batch_size": batch_size, **(training or {})}})
    return [RecordDataset(one, cache_dir=tmp_path / "cache") for one in config.data.train], config


def check(tmp_path, records, objective, processes=1, **more):
    data, config = read(tmp_path, records, objective, **more)
    check_sources(data, config, build_objective(config.objective), processes=processes)


ALONE = [record((1, 0.9)), record((1, 0.3))]  # what a teacher says of positives alone
EQUAL = [record((1, 0.9), (0, 0.9)), record((1, 0.2), (0, 0.2))]
TAUGHT = [record((1, 0.9), (0, 0.2)), record((1, 0.2), (0, 0.4))]
LIST, SIDES = ("distil_kl", "udr"), ("margin_mse", "dcd", "dse")


@pytest.mark.parametrize("name", [*LIST, *SIDES])
def test_a_teacher_of_positives_alone_is_refused(tmp_path, name):
    wanted = "a positive and a negative" if name in SIDES else "two documents"
    with pytest.raises(
        ConfigError,
        match=f"'some': all 2 records, the first at .*some.jsonl:1, have no 'score' of {wanted} .*'{name}' learns",
    ):
        check(tmp_path, ALONE, name)
    check(tmp_path, TAUGHT, name)


@pytest.mark.parametrize("name", [*LIST, *SIDES])
def test_a_teacher_that_tells_no_documents_of_a_query_apart_is_refused(tmp_path, name):
    """Its scores differ from query to query, so that no batch shows one number."""
    with pytest.raises(ConfigError, match=f"'some': all 2 records, .*:1, have no scores of .* that differ.*'{name}'"):
        check(tmp_path, EQUAL, name)
    check(tmp_path, [*EQUAL, *TAUGHT], name)


@pytest.mark.parametrize("name", [*LIST, *SIDES])
def test_a_teacher_of_documents_that_are_not_drawn_is_refused(tmp_path, name):
    """Groups without room for negatives; several positives, of which one is drawn."""
    with pytest.raises(ConfigError, match="'some': all 2 records.*train_group_size.*'?"):
        check(tmp_path, TAUGHT, name, train_group_size=1, ignore_fields=["negatives"])
    several = [record((1, 0.9), (1, 0.2))]
    with pytest.raises(ConfigError, match=f"objective '{name}'"):
        check(tmp_path, several, name)
    if name in LIST:
        check(tmp_path, several, name, positives_per_query=2)


def test_a_guide_of_the_data_has_to_score_negatives(tmp_path):
    block = {"type": "multicsr", "momentum": None}
    with pytest.raises(
        ConfigError, match="'some': all 2 records, .* have no 'score' of a negative .*'multicsr' leaves"
    ):
        check(tmp_path, ALONE, block)
    check(tmp_path, EQUAL, block)
    for records in (ALONE, [record(1)]):
        check(tmp_path, records, "multicsr")  # the guide is the model at its start


def test_the_part_of_a_list_and_of_a_task_is_named(tmp_path):
    for objective in (["infonce", "distil_kl"], {"by_task": {"retrieval": ["infonce", "distil_kl"]}}):
        with pytest.raises(ConfigError, match="'some': all 2 records.*objective 'distil_kl'"):
            check(tmp_path, ALONE, objective)


@pytest.mark.parametrize(
    ("objective", "needed"),
    [("gram", 2), ("cleanclip", 3), ("tcl", 3), ("alip", 2), ("dreamlip", 2), ("mv_infonce", 2), ("mv_dhel", 2)],
)
def test_too_few_views_are_refused(tmp_path, objective, needed):
    short, whole = record(*[1] * (needed - 1)), record(*[1] * needed)
    group = {"positives_per_query": needed}
    message = f"'some': all 1 records, the first at .*:1, have fewer than {needed} positives; objective '{objective}'"
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, [short], ["infonce", objective], **group)
    check(tmp_path, [short, whole], ["infonce", objective], **group)
    data, config = read(tmp_path, [whole, short, short], ["infonce", objective], **group)
    rare = f"'some': 2 of 3 records, the first at .*:2, have .*'{objective}' compares 2 .* has 1.0 of 3 on average"
    with pytest.raises(ConfigError, match=rare):
        check(tmp_path, [whole, short, short], ["infonce", objective], batch_size=3, **group)
    (warning,) = shortages(data[0], config, build_objective(config.objective))
    assert "'some': 2 of 3 records, the first at " in warning and "some.jsonl:2, have fewer" in warning
    assert f"'{objective}' learns little or nothing of them" in warning


@pytest.mark.parametrize("name", ["wasserstein", "kl_divergence", "listnet"])
def test_degrees_are_wanted_within_a_query(tmp_path, name):
    """A query's positives all 1 and another's all 2 tell no more than relevant or not."""
    apart, within, group = [record(1, 1, 0), record(2, 2, 0)], [record(2, 1, 0)], {"positives_per_query": 2}
    message = f"'some': all 2 records, .*:1, have no positives of different relevance.*objective '{name}' compares deg"
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, apart, name, **group)
    check(tmp_path, [*apart, *within], name, **group)
    with pytest.raises(ConfigError, match=f"objective '{name}' compares degrees"):
        check(tmp_path, within, name, ignore_fields=["relevance"])  # one positive is drawn


def test_pairs_that_are_made_have_one_positive(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"text": "a text that has some words to crop " * 9}) + "\n")
    source = {"path": str(path), "format": "documents", "pairs": "random_crops"}
    config = build_config({"data": {"train": [source], "positives_per_query": 2}, "objective": "gram"})
    data = [RecordDataset(config.data.train[0], cache_dir=tmp_path / "cache")]
    with pytest.raises(ConfigError, match="documents.jsonl:1, have fewer than 2 positives; objective 'gram'"):
        check_sources(data, config, build_objective("gram"))


@pytest.mark.parametrize("objective", ["degla", "negclip"])
def test_negatives_that_are_needed(tmp_path, objective):
    with pytest.raises(ConfigError, match=f"'some': all 1 records.* have no negative; objective '{objective}' needs"):
        check(tmp_path, [record(1)], objective)
    with pytest.raises(ConfigError, match=f"have no room for negatives.*objective '{objective}' needs hard negatives"):
        check(tmp_path, [record(1, 0)], objective, train_group_size=1, ignore_fields=["negatives"])
    check(tmp_path, [record(1), record(1, 0)], objective)


@pytest.mark.parametrize(
    ("objective", "least"),
    [("cwcl", 2), ("uniformity", 2), ("supcon", 2), ("tree_supcon", 2), ({"type": "whitened", "group_size": 4}, 5)],
)
def test_batches_that_are_too_small_are_refused(tmp_path, objective, least):
    records = [{**record(1), **({"labels": ["a"]} if objective == "tree_supcon" else {})}]
    name = objective if isinstance(objective, str) else objective["type"]
    with pytest.raises(ConfigError, match=rf"'some': a batch has {least - 1} queries; objective '{name}' .*{least} or"):
        check(tmp_path, records, objective, batch_size=least - 1)
    with pytest.raises(ConfigError, match=f"'some': a batch has {least - 1} queries"):
        check(tmp_path, records, objective, train={"batch_size": least - 1})
    check(tmp_path, records, objective, batch_size=least)
    if least % 2 == 0:
        check(tmp_path, records, objective, batch_size=least // 2, processes=2)


def test_a_top_k_of_all_documents_is_refused(tmp_path):
    block, records = {"type": "soft_top_k", "k": 8}, [record(1, 0), record(1, 0)]
    with pytest.raises(ConfigError, match="'some': a query meets 8 documents at most; objective 'soft_top_k' needs 9"):
        check(tmp_path, records, block, batch_size=2)
    check(tmp_path, records, block, batch_size=3)
    with pytest.raises(ConfigError, match="meets 4 documents at most"):
        check(tmp_path, records, block, batch_size=3, train={"in_batch_negatives": False})


def test_a_batch_of_one_pair_is_refused(tmp_path):
    graded = [record(value, task="sts") for value in (0.2, 0.9, 0.5)]
    with pytest.raises(ConfigError, match="'some': one query a batch.*some.jsonl:1 has one document; .*'pearson'"):
        check(tmp_path, graded, "pearson", batch_size=1, processes=2)
    check(tmp_path, graded, "pearson", batch_size=2)
    check(tmp_path, [record(0.2, 0.9, 1.0, task="sts")], "pearson", batch_size=1)


def test_a_query_that_meets_its_positive_alone_is_refused(tmp_path):
    """Its loss is 0 whatever the model does."""
    off = {"in_batch_negatives": False}
    for more in ({"train": off}, {"batch_size": 1}):
        with pytest.raises(ConfigError, match="'some' has .*objective 'infonce' has nothing to compare.* always 0"):
            check(tmp_path, [record(1)], "infonce", **more)
        check(tmp_path, [record(1, 0)], "infonce", **more)
        check(tmp_path, [record(2, 1)], "infonce", positives_per_query=2, **more)
    with pytest.raises(ConfigError, match="its loss is always 0"):  # negatives that are not drawn
        check(tmp_path, [record(1, 0)], "infonce", train=off, train_group_size=1, ignore_fields=["negatives"])
    check(tmp_path, [record(1)], "infonce", batch_size=1, processes=2)
    local = {"type": "infonce", "cross_device_negatives": False}
    with pytest.raises(ConfigError, match="its loss is always 0"):
        check(tmp_path, [record(1)], local, batch_size=1, processes=2)


@pytest.mark.parametrize("option", ["same_tower_negatives", "symmetric"])
@pytest.mark.parametrize("name", ["infonce", "dcl", "contrastive"])
def test_options_between_queries_that_never_meet_are_refused(tmp_path, option, name):
    off, records = {"train": {"in_batch_negatives": False}}, [record(1, 0)]
    title = "infonce" if name == "contrastive" else name
    message = (
        f"objective '{title}'.{option}: true has no effect.*in_batch_negatives: false of data source 'some'.*remove"
    )
    for block in (
        {"type": name, option: True},
        ["rafa", {"type": name, option: True}],
        {"by_task": {"retrieval": {"type": name, option: True}}},
        {"type": name, option: True, "matryoshka": {"dims": [8]}},
    ):
        with pytest.raises(ConfigError, match=message):
            check(tmp_path, records, block, **off)
        check(tmp_path, records, block)
    check(tmp_path, records, {"type": name, option: False}, **off)
    check(tmp_path, records, name, **off)  # dcl's own default


def test_options_between_queries_may_act_on_some_sources_only(tmp_path):
    data, config = read(tmp_path, [record(1, 0)], {"type": "infonce", "symmetric": True})
    off = read(tmp_path, [record(1, 0)], "infonce", train={"in_batch_negatives": False})[0]
    build_objective(config.objective).check([*off, *data])
    with pytest.raises(ConfigError, match="'infonce'.symmetric: true has no effect"):
        build_objective(config.objective).check([*off, *off])


SOON = {"type": "proto_clip", "prototypes": 2, "episode": 2}


@pytest.mark.parametrize("objective", ["rafa", "alignment", "uniformity", "supcon", "prototypes", SOON])
def test_in_batch_negatives_may_be_off_where_no_pair_is_a_negative_of_another(tmp_path, objective):
    check(tmp_path, [record(1)], objective, train={"in_batch_negatives": False})


@pytest.mark.parametrize(("name", "needed"), [("cleanclip", 3), ("tcl", 3), ("alip", 2)])
def test_positives_that_have_a_place_each_are_not_drawn(tmp_path, name, needed):
    whole = record(*[1] * needed)
    check(tmp_path, [whole, record(*[1] * needed)], name, positives_per_query=needed, train_group_size=8)
    check(tmp_path, [whole, record(*[1] * 5)], name, positives_per_query=5, train_group_size=8)
    message = f"'some': 1 of 2 records, the first at .*some.jsonl:2, have more than {needed} pos.* '{name}' knows each"
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, [whole, record(*[1] * 5)], name, positives_per_query=needed, train_group_size=8)
    check(tmp_path, [whole, record(*[1] * 5)], "mv_infonce", positives_per_query=needed, train_group_size=8)


@pytest.mark.parametrize(
    ("training", "processes", "ends"),
    [
        ({"max_steps": 3}, 1, "24"),
        ({"max_steps": 3}, 2, ""),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 1, ""),
        ({"num_train_epochs": 2}, 1, "20"),
        ({"num_train_epochs": 4}, 1, ""),
        ({}, 1, "30"),
    ],
)
def test_a_run_that_ends_before_an_objective_begins_is_refused(tmp_path, training, processes, ends):
    objective = [{"type": "infonce"}, {"type": "proto_clip", "prototypes": 2, "episode": 32}]
    given = {"records": [record(1) for _ in range(10)], "training": training, "processes": processes}
    if ends:
        message = f"'some': the run ends after {ends} queries, and objective 'proto_clip' has no loss before .* 32"
        with pytest.raises(ConfigError, match=message):
            check(tmp_path, objective=objective, **given)
    else:
        check(tmp_path, objective=objective, **given)


def test_in_batch_negatives_of_graded_pairs_can_only_be_off(tmp_path):
    graded = [record(0.2, task="sts"), record(0.9, task="sts"), record(0.5, task="sts")]
    for objective in ("pearson", ["rank_kl", "thresholded_infonce"]):
        if objective != "pearson":
            graded = [*graded, record(1.0, task="sts")]
        check(tmp_path, graded, objective, train={"in_batch_negatives": False})
        with pytest.raises(ConfigError, match="'some': in_batch_negatives: true .* pairs are compared with pairs"):
            check(tmp_path, graded, objective, train={"in_batch_negatives": True})


@pytest.mark.parametrize("objective", ["infonce", "dclw", "metrix", "cwcl"])
def test_records_that_are_all_alike_are_refused(tmp_path, objective):
    """What shares a query or a positive is no negative of each other: the loss is 0."""
    first = record(1)
    plain = [first, {**first, "query": "another"}]
    with pytest.raises(ConfigError, match=f"'some': all records have the same first positive.*'{objective}'"):
        check(tmp_path, plain, objective)
    other = {**record(1), "query": first["query"]}
    with pytest.raises(ConfigError, match=f"'some': all records have the same query.*'{objective}'"):
        check(tmp_path, [first, other], objective)
    check(tmp_path, [*plain, other], objective)
    if objective in ("infonce", "dclw"):
        one = record(1, 0)
        check(tmp_path, [one, {**one, "query": "another"}], objective)
        check(tmp_path, plain, {"type": objective, "mask_duplicates": False})


@pytest.mark.parametrize("objective", ["tree_supcon", ["infonce", "tree_supcon"]], ids=str)
def test_labels_that_are_all_the_same_are_refused(tmp_path, objective):
    records = [
        {"query": f"q {place}", "documents": [{"content": f"d {place}"}], "labels": [label]}
        for place, label in enumerate("aab")
    ]
    with pytest.raises(ConfigError, match="'some': all records have the same labels; objective 'tree_supcon'"):
        check(tmp_path, records[:2], objective)
    check(tmp_path, records, objective)


# What is counted ------------------------------------------------------------------------------------------------------


def test_kinds_of_records_are_told_apart_by_loops():
    """Every record of up to two positives and two negatives, each with no score, 0.1 or 0.2."""
    choices = [()] + [(a,) for a in (None, 0.1, 0.2)] + [(a, b) for a in (None, 0.1, 0.2) for b in (None, 0.1, 0.2)]
    for positives in choices:
        for negatives in choices:
            documents = [Document((Text("p"),), 1.0, score) for score in positives]
            kind = held([*documents, *[Document((Text("n"),), 0.0, score) for score in negatives]])
            for most_positives in (0, 1, 2):
                for most_negatives in (0, 1, 2):
                    groups = [
                        [score for score in (*some, *others) if score is not None]
                        for some in subsets(positives, most_positives)
                        for others in subsets(negatives, most_negatives)
                    ]
                    assert kind.scored(most_positives, most_negatives) == max(min(2, len(one)) for one in groups)
                    assert kind.differ(most_positives, most_negatives) == any(len(set(one)) > 1 for one in groups)


def subsets(scores, most):
    """All choices of as many as there are, at most `most`."""
    count = min(most, len(scores))
    return [()] if not count else [scores] if count == len(scores) else [(score,) for score in scores]


def test_a_census_comes_back_from_json_and_knows_the_first(tmp_path):
    records = [record(1), record(1, 0), record(1), record(1, 1, 0)]
    (data,), _ = read(tmp_path, records, "infonce")
    again = Census(*json.loads(json.dumps(data.census.as_list())))
    for census in (data.census, again):
        assert census.records == 4
        assert census.those(lambda kind: not kind.negatives) == (2, f"{tmp_path}/some.jsonl:1")
        assert census.those(lambda kind: kind.negatives > 0) == (2, f"{tmp_path}/some.jsonl:2")
        assert census.those(lambda kind: kind.positives > 2) == (0, "")


def test_skipped_records_do_not_count_and_a_stream_counts_the_same(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [record(1), {"query": "q", "documents": []}, record(1, (0, 0.5))]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    read_whole = RecordDataset(SourceConfig(path=str(path)), on_bad_record="skip", cache_dir=tmp_path / "cache")
    streamed = RecordStream(SourceConfig(path=str(path), streaming=True), on_bad_record="skip")
    assert read_whole.census.records == streamed.census.records == 2
    kinds, others = (sorted(map(str, one.census.as_list()[0])) for one in (read_whole, streamed))
    assert kinds == others


# A batch without what is needed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["gram", "alip", {"type": "tcl", "size": 8}, "cleanclip"])
@pytest.mark.parametrize("positives", [1, 2])
def test_a_batch_of_too_few_views_has_no_loss_and_no_memory(block, positives):
    """Beside others that have them; a run is not ended by the chance of one batch."""
    objective = build_objective(block, 8)
    needed = objective.positives_needed
    queries, documents, labels = batch(positives=needed - 1 if positives == 1 else needed)
    if positives == 2:  # one query has enough
        relevance = labels.relevance.clone().view(5, -1)
        relevance[1:, 0] = 0
        labels = labels.__class__(**{**vars(labels), "relevance": relevance.flatten()})
    queries.vectors.requires_grad_()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    loss, metrics = step(objective, (queries, documents, labels))
    loss.backward()
    assert loss == 0 and not queries.vectors.grad.any()
    assert metrics["left_out"] == pytest.approx(1.0 if positives == 1 else 0.8)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    of = SimpleNamespace(labels=labels, chunks=(), place=torch.zeros(len(labels.owner) + 5, dtype=torch.long))
    look_at(objective.view(objective.gather(queries, documents, labels)), queries, documents, of)


@pytest.mark.parametrize("name", ["degla", "negclip"])
def test_a_batch_without_negatives_trains_what_is_left(name):
    queries, documents, labels = batch(negatives=0)
    queries.vectors.requires_grad_()
    block = {"type": name, "momentum": None} if name == "degla" else name
    loss, _ = build_objective(block)(queries, documents, labels)
    loss.backward()
    assert torch.isfinite(loss) and queries.vectors.grad.any()


GRADED = [record(2, 1), record(3, 1)]
RELEVANT = [record(1), record(1)]
JUDGED = [record(1, 0), record(1, 0)]


def rank(tmp_path, records, objective, **data):
    """As `check`, of a reranker; its warnings."""
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    tree = {"data": {"train": [{"path": str(path), "name": "judged"}], "train_group_size": 4, **data}}
    config = build_config({**tree, "objective": objective}, kind=RerankerConfig)
    (source,) = [RecordDataset(one, cache_dir=tmp_path / "cache") for one in config.data.train]
    part = build_objective(config.objective)
    check_sources([source], config, part)
    return shortages(source, config, part)


ONE_BY_ONE = ["sft", {"type": "weight_direction"}, {"type": "weight_direction", "weight": "one"}]
CONTRASTS = [
    {"type": "ranking", "loss": "infonce"},
    {"type": "weight_direction", "weight": "contrastive"},
]
ORDERS = [
    "ranknet",
    "lambdarank",
    "listmle",
    *({"type": "ranking", "loss": loss} for loss in ("listnet", "wasserstein")),
]


@pytest.mark.parametrize("objective", [*ONE_BY_ONE, *CONTRASTS, *ORDERS], ids=str)
def test_a_reranker_needs_what_its_objective_compares(tmp_path, objective):
    """Source and first record are named; a record that lacks it is a warning where others have it, but of objectives
    that judge documents one by one, to which it is nothing."""
    assert rank(tmp_path, JUDGED, objective) == []
    what = "no two documents of different relevance" if objective in ORDERS else "no negative"
    with pytest.raises(ConfigError, match=rf"'judged': all 2 records, the first at .*judged.jsonl:1, have {what}"):
        rank(tmp_path, RELEVANT, objective)
    warnings = rank(tmp_path, [*JUDGED, RELEVANT[0]], objective)
    if objective in ONE_BY_ONE:
        assert warnings == []
    else:
        assert re.search(rf"1 of 3 records, the first at .*judged.jsonl:3, have {what}", warnings[0])


@pytest.mark.parametrize("objective", ORDERS, ids=str)
def test_degrees_of_relevance_are_an_order(tmp_path, objective):
    """Without any negative; drawn one positive at a time they are none."""
    assert rank(tmp_path, GRADED, objective, positives_per_query=2) == []
    with pytest.raises(ConfigError, match="no two documents of different relevance"):
        rank(tmp_path, GRADED, objective, positives_per_query=1, ignore_fields=["relevance"])


def test_a_record_without_a_positive_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"judged.jsonl:2: no document has a relevance above 0"):
        rank(tmp_path, [*JUDGED[:1], record(0, 0)], "sft")


def test_a_taught_list_needs_scores_and_no_negative(tmp_path):
    taught = {"type": "ranking", "loss": "distil_kl"}
    scored = [record((1, 0.9), (1, 0.1)), record((1, 0.8), (1, 0.3))]
    assert rank(tmp_path, scored, taught, positives_per_query=2) == []
    with pytest.raises(ConfigError, match="have no 'score' of two documents"):
        rank(tmp_path, JUDGED, taught)
