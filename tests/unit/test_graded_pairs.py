"""Graded pairs: the losses against plain loops, the objective, and sources that do not suit it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.config import build_config
from mmembed.content import Task
from mmembed.data.dataset import RecordDataset
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores, pro
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources

LOSS_NAMES = ("pearson", "rank_kl", "pro")


def looped(name, values, gold):
    """One row by the definition; `values` are similarities / temperature."""
    count = len(values)
    if name == "pearson":
        mean_v, mean_g = sum(values) / count, sum(gold) / count
        covariance = sum((v - mean_v) * (g - mean_g) for v, g in zip(values, gold, strict=True))
        squares = [sum((x - mean) ** 2 for x in row) for row, mean in ((values, mean_v), (gold, mean_g))]
        return 1 - covariance / math.sqrt(squares[0] * squares[1]) if len(set(gold)) > 1 else 0.0
    if name == "rank_kl":
        ranks = [sum(g > own for g in gold) + (sum(g == own for g in gold) - 1) / 2 for own in gold]
        ideal = [math.exp((count - 1 - rank) / max(1, count - 1) / 0.05) for rank in ranks]
        found = [math.exp(value) for value in values]
        shares = [(i / sum(ideal), f / sum(found)) for i, f in zip(ideal, found, strict=True)]
        return sum(p * math.log(p / q) for p, q in shares) / count
    losses = []
    for k in range(count):
        lower = [j for j in range(count) if gold[j] < gold[k]]
        if lower:
            own = math.exp(max(gold[k] - gold[j] for j in lower) * values[k])
            losses.append(-math.log(own / (own + sum(math.exp((gold[k] - gold[j]) * values[j]) for j in lower))))
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(LOSS_NAMES))
def test_losses_are_those_of_the_loops(data, name):
    """Golds repeat, so that ties occur; a candidate that is not valid does not count."""
    count = data.draw(st.integers(1, 7))
    values = data.draw(st.lists(st.floats(-8, 8), min_size=count, max_size=count))
    if name == "pearson" and count > 1 and max(values) - min(values) < 0.1:
        values[0] += 1.0  # all but equal similarities are below the spread that the loss tells apart
    gold = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.25, 0.7, 1.0]), min_size=count, max_size=count))
    hidden = data.draw(st.integers(0, 2))
    scores = Scores(
        torch.tensor([values + [3.0] * hidden], dtype=torch.float64),
        torch.tensor([gold + [0.9] * hidden], dtype=torch.float64),
        torch.tensor([[True] * count + [False] * hidden]),
    )
    found = LOSSES.build(name)(scores)
    assert found.tolist() == pytest.approx([looped(name, values, gold)], abs=1e-9)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("values", [[0.3, 0.1, 0.2], [0.5, 0.5, 0.5]], ids=["different", "equal"])
def test_constant_gold_stays_in_the_graph(name, values):
    """In float32, where the mean of equal numbers need not be that number."""
    given_values = torch.tensor([values], requires_grad=True)
    loss = LOSSES.build(name)(Scores(given_values, torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)))
    loss.sum().backward()
    assert torch.isfinite(given_values.grad).all()
    if name != "rank_kl":  # all ranks are shared: the divergence from equal shares is left
        assert loss.item() == 0 and not given_values.grad.any()


def pro_directly(scores):
    """By the definition, every anchor against every candidate: (Q, C, C)."""
    values = scores.values.masked_fill(~scores.valid, 0.0)
    gap = scores.relevance[:, :, None] - scores.relevance[:, None, :]  # (Q, anchors, others)
    lower = (gap > 0) & scores.valid[:, :, None] & scores.valid[:, None, :]
    others = (gap * values[:, None, :]).masked_fill(~lower, -1e300).logsumexp(2)  # (Q, C)
    losses = torch.nn.functional.softplus(others - gap.masked_fill(~lower, 0.0).amax(2) * values)
    return losses.masked_fill(~lower.any(2), 0.0).sum(1) / lower.any(2).sum(1).clamp_min(1)


@pytest.mark.parametrize("cells", [1, 37, 2**20])
@pytest.mark.parametrize(("rows", "candidates", "grades"), [(1, 9, 4), (5, 7, 3), (3, 40, 1000), (4, 6, 1), (2, 1, 2)])
def test_pro_in_blocks_is_the_whole_comparison(monkeypatch, cells, rows, candidates, grades):
    """Values and gradients, where blocks cut rows and where one holds several."""
    monkeypatch.setattr(pro, "CELLS", cells)
    draw = torch.Generator().manual_seed(cells + rows)
    values = (4 * torch.randn(rows, candidates, generator=draw, dtype=torch.float64)).requires_grad_()
    gold = torch.randint(grades, (rows, candidates), generator=draw).double() / max(1, grades - 1)
    scores = Scores(values, gold, torch.rand(rows, candidates, generator=draw) < 0.8)
    weights = torch.randn(rows, generator=draw, dtype=torch.float64)
    found, wanted = LOSSES.build("pro")(scores), pro_directly(scores)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((weights * of).sum(), values)[0] for of in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_pro_holds_no_more_than_blocks():
    """2,048 pairs of different gold take less than one float for every two of them."""
    from mmembed.training.memory import Meter

    values = torch.randn(1, 2048, requires_grad=True)
    scores = Scores(values, torch.randperm(2048)[None] / 2048, torch.ones(1, 2048, dtype=torch.bool))
    with Meter() as meter:
        torch.autograd.grad(LOSSES.build("pro")(scores).sum(), values)
    assert meter.peak < 4 * 2048**2


# The objective --------------------------------------------------------------------------------------------------------


def batch(gold, owner=None, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    owner = list(range(len(gold))) if owner is None else owner
    queries = max(owner) + 1
    keys = torch.arange(len(gold))[:, None].expand(-1, 2) + 100
    labels = BatchLabels(
        owner=torch.tensor(owner),
        relevance=torch.tensor(gold),
        document_keys=keys,
        query_keys=torch.arange(queries),
        positive_keys=keys[[owner.index(query) for query in range(queries)]].unsqueeze(1),
        in_batch=False,
        source="sentences",
        task=Task.STS,
    )
    vectors = [torch.randn(count, size, generator=generator).requires_grad_() for count in (queries, len(gold))]
    return Embeddings(vectors[0]), Embeddings(vectors[1]), labels


def test_a_query_meets_its_own_documents_only():
    gold, owner = [0.9, 0.1, 0.4, 0.6], [0, 0, 1, 2]
    queries, documents, labels = batch(gold, owner)
    loss, metrics = build_objective({"type": "rank_kl", "temperature": 0.1})(queries, documents, labels)
    cosines = torch.cosine_similarity(queries.vectors[owner], documents.vectors)
    assert loss.item() == pytest.approx(looped("rank_kl", (cosines / 0.1).tolist(), gold), abs=1e-6)
    assert metrics["pairs"].item() == 4
    assert metrics["correlation"].item() == pytest.approx(1 - looped("pearson", cosines.tolist(), gold), abs=1e-5)


def test_a_loss_of_graded_pairs_is_one_by_its_name():
    objective = build_objective({"type": "rank_kl", "temperature_of_ranks": 0.2, "temperature": 0.1})
    assert (objective.name, objective.loss.name, objective.loss.temperature_of_ranks) == ("pairs", "rank_kl", 0.2)
    assert objective.temperature.value == 0.1 and objective.pairs
    with pytest.raises(ConfigError, match="objective 'pearson': unknown option 'symmetric'"):
        build_objective({"type": "pearson", "symmetric": True})


def test_half_precision_keeps_golds_apart():
    """Under autocast similarities are bfloat16, in which 0.801 and 0.8 are one number."""
    gold = [0.801, 0.8, 0.2]
    queries, documents, labels = batch(gold)
    objective = build_objective({"type": "rank_kl", "temperature": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective(queries, documents, labels)
    exact, _ = objective(queries, documents, labels)
    tied, _ = objective(*batch([0.8, 0.8, 0.2]))
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.05 < abs(tied - exact)


def test_monitors_see_similar_and_other_pairs():
    objective = build_objective("pearson")
    view = objective.view(objective.gather(*batch([0.9, 0.1, 0.4, 0.6], [0, 0, 1, 2])))
    assert view.valid.tolist() == [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    assert (view.relevance > 0).nonzero().tolist() == [[0, 0], [2, 3]]


def test_one_pair_is_refused():
    with pytest.raises(ConfigError, match="'pearson': source 'sentences' gives one pair a batch"):
        build_objective("pearson")(*batch([0.5]))


def test_a_sum_is_of_one_kind():
    with pytest.raises(ConfigError, match="'pearson' takes graded pairs, 'infonce' takes positives.*by_task"):
        build_objective(["pearson", "infonce"])


def test_anchors_are_the_pairs_above_the_threshold():
    """Against loops: the mean over anchors, all documents as candidates; without an anchor 0, with a gradient of 0."""
    gold = [1.0, 0.3, 0.8, 0.9]
    queries, documents, labels = batch(gold)
    objective = build_objective({"type": "thresholded_infonce", "threshold": 0.8, "temperature": 0.5})
    loss, metrics = objective(queries, documents, labels)
    values = objective.similarity_of(queries, documents) / 0.5
    losses = [-values[i].log_softmax(0)[i].item() for i in (0, 2, 3)]
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert metrics["anchors"].item() == 3
    nothing, _ = objective(*batch([0.1, 0.2])[:2], batch([0.1, 0.2])[2])
    assert nothing.item() == 0
    nothing.backward()


# One positive at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["lower", "all"])
def test_other_positives_are_left_out_for_everybody(negatives):
    """Queries with two, one and three positives: turn by turn, by the definition."""
    positive = [True, True, False, True, False, True, True, True]
    owner = [0, 0, 0, 1, 1, 2, 2, 2]
    turn = [0, 1, -1, 0, -1, 0, 1, 2]
    queries, documents, labels = batch([float(one) for one in positive], owner)
    labels = BatchLabels(**{**vars(labels), "in_batch": True})
    objective = build_objective(
        {"type": "infonce", "negatives": negatives, "positives": "one_at_a_time", "temperature": 0.5}
    )
    loss, _ = objective(queries, documents, labels)
    values = (objective.similarity_of(queries, documents) / 0.5).tolist()
    rows = []
    for query in range(3):
        of_query = []
        for k in range(3):
            columns = [j for j in range(8) if turn[j] in (k, -1)]
            own = [j for j in columns if owner[j] == query and turn[j] == k]
            if own:
                total = sum(math.exp(values[query][j]) for j in columns)
                of_query.append(-math.log(math.exp(values[query][own[0]]) / total))
        rows.append(sum(of_query) / len(of_query))
    assert loss.item() == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_one_at_a_time_needs_several_positives():
    block = {"type": "infonce", "positives": "one_at_a_time"}
    with pytest.raises(ConfigError, match="one_at_a_time.*positives_per_query"):
        build_config({"objective": block})
    build_config({"objective": block, "data": {"positives_per_query": 2}})


# Sources --------------------------------------------------------------------------------------------------------------


def check(tmp_path, relevances, objective, task="sts", **source):
    path = tmp_path / "some.jsonl"
    records = [
        {"query": f"q {place}", "documents": [{"content": f"d {place}", "relevance": one}], "task": task}
        for place, one in enumerate(relevances)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    config = build_config({"data": {"train": [{"path": str(path), "name": "some", **source}]}, "objective": objective})
    data = [RecordDataset(one, cache_dir=tmp_path / "cache") for one in config.data.train]
    check_sources(data, config, build_objective(config.objective))


@pytest.mark.parametrize(
    ("relevances", "objective", "source", "named"),
    [
        ([1.0, 0.5, 0.2], "pearson", {"task": "retrieval"}, r"'some' \(retrieval\): objective 'pearson' is for graded"),
        ([1.0, 0.0, 1.0], "rank_kl", {}, r"'some': its similarities are 0 and 1 only; objective 'rank_kl'"),
        ([0.4, 0.4], "pro", {}, r"'some': all pairs have the same similarity 0.4; objective 'pro'"),
        ([3.0, 1.0, 0.5], ["pearson", "pro"], {}, r"'some': a similarity is 3; objective 'pearson' takes 0 to 1"),
        ([0.9, 0.1, 0.5], "pearson", {"in_batch_negatives": True}, r"'some': in_batch_negatives: true has no effect"),
        ([0.9, 0.1, 0.5], "thresholded_infonce", {}, r"'some': its highest similarity is 0.9, below the threshold 1"),
        ([0.9, 0.1, 0.5], "infonce", {}, r"'some': 2 STS records, .*neither.*pearson, rank_kl, pro"),
    ],
)
def test_sources_that_do_not_suit_are_refused(tmp_path, relevances, objective, source, named):
    with pytest.raises(ConfigError, match=named):
        check(tmp_path, relevances, objective, **source)


def test_suitable_sources_are_taken(tmp_path):
    check(tmp_path, [0.9, 0.1, 0.5], ["pearson", {"type": "thresholded_infonce", "threshold": 0.9}])
    check(tmp_path, [0.9, 0.1, 0.5], {"type": "pearson", "matryoshka": {"dims": [8, 4]}})


def test_a_contrastive_loss_that_needs_degrees_refuses_two(tmp_path, monkeypatch):
    from mmembed.losses.infonce import InfoNCE

    check(tmp_path, [1.0, 1.0], "infonce", task="retrieval")
    monkeypatch.setattr(InfoNCE, "needs_grades", True)
    with pytest.raises(ConfigError, match="'some' tells relevant from not, no degrees; objective 'infonce'"):
        check(tmp_path, [1.0, 1.0], "infonce", task="retrieval")
