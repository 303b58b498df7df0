"""The guide of a contrast against plain loops: which negatives it takes out, where it is told, and where refused."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from mmembed.config import build_config
from mmembed.data.labels import Grades
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import build_objective
from mmembed.objectives.guide import Guide
from mmembed.training.guide_vectors import check_guide, guide_of
from tests.unit.test_contrastive import OWNER, RELEVANCE, embed, looped_loss, make_labels

NAN = math.nan


def limit(positive: float, margin: float, strategy: str) -> float:
    return positive - (margin if strategy == "absolute" else margin * abs(positive))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("margin", "strategy"), [(0.0, "absolute"), (0.2, "absolute"), (-0.1, "absolute"), (0.3, "relative")]
)
def test_what_the_guide_rates_above_the_positive_is_no_negative(margin: float, strategy: str, symmetric: bool) -> None:
    sides, guide = (embed(3, seed=4), embed(6, seed=5)), (embed(3, seed=6), embed(6, seed=7))
    labels = dataclasses.replace(make_labels(OWNER, RELEVANCE), taught=guide)
    told = normalize(guide[0].vectors, dim=1) @ normalize(guide[1].vectors, dim=1).T

    def skip(query: int, document: int) -> bool:
        return bool(told[query, document] > limit(float(told[query, 2 * query]), margin, strategy))

    loss = looped_loss(sides[0].vectors, sides[1].vectors, OWNER, RELEVANCE, 0.5, skip)
    if symmetric:  # a positive document meets the queries; what the guide puts above its own query is out
        back = looped_loss(
            sides[1].vectors[::2],
            sides[0].vectors,
            [0, 1, 2],
            [1, 1, 1],
            0.5,
            lambda i, j: bool(told[j, 2 * i] > limit(float(told[i, 2 * i]), margin, strategy)),
        )
        loss = (loss + back) / 2
    block = {"type": "infonce", "temperature": 0.5, "symmetric": symmetric}
    objective = build_objective({**block, "guide": {"margin": margin, "strategy": strategy}})
    assert objective.teacher_momentum == 1.0
    assert objective(*sides, labels)[0].item() == pytest.approx(loss, rel=1e-6)
    assert build_objective(block)(*sides, labels)[0].item() > loss + 1e-3, "some negatives are out"


def test_the_lowest_positive_counts_and_a_negative_score_is_no_harder_to_pass() -> None:
    judged = torch.tensor([[0.8, 0.6, 0.7, 0.5], [-0.2, NAN, -0.22, -0.2001]])
    relevance = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    everything = torch.ones(2, 4, dtype=torch.bool)
    out = Guide(margin=0.05, strategy="relative").false_negatives(judged, relevance, everything)
    assert out.tolist() == [[False, False, True, False], [False, False, False, True]]
    unknown = torch.tensor([[NAN, NAN, 0.9, 0.5]])
    assert not Guide().false_negatives(unknown, relevance[:1], everything[:1]).any(), "nothing to compare with"


def test_other_queries_are_judged_too() -> None:
    """The guide has query 1 nearer to query 0 than its positive: with same-tower negatives it is out."""
    sides, labels = (embed(2), embed(2, seed=1)), make_labels([0, 1], [1, 1])
    angles = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)  # queries 0, 1, documents 0, 1
    guide = torch.stack([angles.cos(), angles.sin()], 1)
    labels = dataclasses.replace(labels, taught=(Embeddings(guide[:2]), Embeddings(guide[2:])))
    q, d = (normalize(one.vectors, dim=1) for one in sides)
    block = {"type": "infonce", "temperature": 1.0, "same_tower_negatives": True, "guide": {}}
    # query 0 keeps document 1; query 1 loses query 0 (0.1) and document 0 (0.4), below the 1.9 of its positive
    expected = float(torch.stack([q[0] @ d[0], q[0] @ d[1]]).logsumexp(0) - q[0] @ d[0]) / 2
    assert build_objective(block)(*sides, labels)[0].item() == pytest.approx(expected, rel=1e-6)


def test_the_scores_of_the_data_guide_where_no_teacher_is_asked_for() -> None:
    sides = embed(3), embed(6, seed=1)
    scores = [0.7, 0.8, 0.7, 0.6, NAN, 0.9]  # of query 0 the negative is above; of query 2 the positive has none
    labels = dataclasses.replace(make_labels(OWNER, RELEVANCE), scores=torch.tensor(scores))
    objective = build_objective({"type": "infonce", "temperature": 0.5, "guide": {"momentum": None}})
    assert objective.teacher_momentum is None and "score" in objective.reads
    expected = looped_loss(sides[0].vectors, sides[1].vectors, OWNER, RELEVANCE, 0.5, lambda i, j: (i, j) == (0, 1))
    assert objective(*sides, labels)[0].item() == pytest.approx(expected, rel=1e-6)


def test_health_counts_what_the_guide_takes_out_apart_from_the_margin() -> None:
    guide = embed(3, seed=6), embed(6, seed=7)
    labels = dataclasses.replace(make_labels(OWNER, RELEVANCE), taught=guide)
    told = normalize(guide[0].vectors, dim=1) @ normalize(guide[1].vectors, dim=1).T
    expected = sum(bool(told[i, j] > told[i, 2 * i]) for i in range(3) for j in range(6)) / 18
    objective = build_objective({"type": "infonce", "guide": {}, "false_negative_margin": 0.0})
    view = objective.view(objective.gather(embed(3), embed(6, seed=1), labels))
    assert 0 < expected == pytest.approx(float(view.masked["guide"]))
    taken = (~view.valid).float().mean()
    assert float(view.masked["margin"]) == pytest.approx(float(taken) - expected)


@pytest.mark.parametrize("dims", [None, [2]])
def test_another_embedder_guides_with_vectors_of_its_own_size(dims) -> None:
    """Also where the model's vectors are cut, or many an input: its own are whole."""
    sides, guide = (embed(3, seed=4), embed(6, seed=5)), (embed(3, size=9, seed=6), embed(6, size=9, seed=7))
    labels = make_labels(OWNER, RELEVANCE)
    told = normalize(guide[0].vectors, dim=1) @ normalize(guide[1].vectors, dim=1).T
    block = {"type": "infonce", "temperature": 0.5, "guide": {"model": "out"}}
    objective = build_objective(block | ({} if dims is None else {"matryoshka": {"dims": dims}}))
    assert guide_of(objective) == "out" and objective.teacher_momentum is None and "score" not in objective.reads
    with pytest.raises(ConfigError, match="the labels of the batch hold no vectors of 'out'"):
        objective(*sides, labels)
    labels = dataclasses.replace(labels, guide=(guide[0].vectors, guide[1].vectors))
    cut = slice(None) if dims is None else slice(dims[0])
    expected = looped_loss(
        sides[0].vectors[:, cut],
        sides[1].vectors[:, cut],
        OWNER,
        RELEVANCE,
        0.5,
        lambda i, j: bool(told[i, j] > told[i, 2 * i]),
    )
    assert objective(*sides, labels)[0].item() == pytest.approx(expected, rel=1e-6)
    several = [
        Embeddings(normalize(one.vectors, dim=1)[:, None], torch.ones(len(one.vectors), 1).bool()) for one in sides
    ]
    if dims is None:
        assert build_objective(block)(*several, labels)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"type": "infonce", "guide": {"model": "a", "momentum": 1}},
            r"guide: model 'a' and a momentum are two guides",
        ),
        ({"type": "infonce", "guide": {"margn": 0.1}}, r"guide: unknown option 'margn'; .*margin"),
        ({"type": "infonce", "guide": {"strategy": "percent"}}, r"guide.strategy: there is no 'percent'"),
        ({"type": "infonce", "guide": {"momentum": 0}}, r"guide.momentum: found 0"),
        ({"type": "multicsr", "guide": {}}, r"'multicsr'.guide: the loss has a teacher of its own"),
    ],
)
def test_a_guide_that_cannot_be_is_refused(block: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


def test_two_guides_of_one_run_are_refused() -> None:
    blocks = [{"type": "infonce", "guide": {}}, {"type": "negative_queue", "momentum": 0.9}]
    with pytest.raises(ConfigError, match="give both the same momentum"):
        _ = build_objective(blocks, 8).teacher_momentum


def test_a_guide_that_cannot_encode_the_data_beforehand_is_refused(tmp_path) -> None:
    def check(source: dict, *guides: str) -> None:
        objective = [{"type": "infonce", "guide": {"model": guide}} for guide in guides]
        config = build_config({"data": {"train": [source]}, "objective": objective, "training": {"max_steps": 2}})
        check_guide(config, build_objective(config.objective))

    with pytest.raises(ConfigError, match=r"guide.model . data.train 'a' .streaming: .*give the guide a momentum"):
        check({"path": "a", "streaming": True}, "mmembed-nano")
    with pytest.raises(ConfigError, match=r"guide.model . data.train 'a' .pairs: "):
        check({"path": "a", "pairs": "random_crops"}, "mmembed-nano")
    with pytest.raises(ConfigError, match="guide.model: .* holds no embedder"):
        check({"path": "a"}, str(tmp_path))
    with pytest.raises(ConfigError, match="guides a and b, but a run has one"):
        check({"path": "a"}, "a", "b")


def test_a_guide_is_a_line_of_yaml() -> None:
    config = build_config({"objective": {"type": "infonce", "guide": {"margin": 0.05, "strategy": "relative"}}})
    assert build_objective(config.objective).guide.strategy == "relative"


def test_a_source_without_scores_is_refused_where_they_guide() -> None:
    source = SimpleNamespace(name="web", fields=set(), source=SimpleNamespace(in_batch_negatives=True), grades=Grades())
    with pytest.raises(ConfigError, match=r"'web' carries no 'score'; objective 'infonce' has a guide that goes by it"):
        build_objective({"type": "infonce", "guide": {"momentum": None}}).check([source])
