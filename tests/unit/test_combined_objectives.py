"""Sums of objectives, losses named as objectives, and the base of the objectives that look at vectors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmembed.config import build_config
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import build_objective


def batch(queries: int = 5, size: int = 8, group: int = 2) -> tuple[Embeddings, Embeddings, BatchLabels]:
    """Group-major: the first document of each group is the positive."""
    generator = torch.Generator().manual_seed(3)
    position = torch.arange(queries * group)
    labels = BatchLabels(
        owner=position // group,
        relevance=(position % group == 0).float(),
        document_keys=torch.stack([position, position], 1) + 1000,
        query_keys=torch.arange(queries),
        positive_keys=(torch.arange(queries) * group + 1000)[:, None, None].expand(-1, -1, 2),
        source="letters",
    )
    vectors = [torch.randn(n, size, generator=generator).requires_grad_() for n in (queries, queries * group)]
    return Embeddings(vectors[0]), Embeddings(vectors[1]), labels


def test_a_list_is_a_weighted_sum() -> None:
    queries, documents, labels = batch()
    parts = [{"type": "infonce", "temperature": 0.1}, {"type": "uniformity", "t": 3.0}, {"type": "alignment"}]
    alone = [build_objective(part)(queries, documents, labels)[0] for part in parts]
    total, metrics = build_objective([parts[0], {**parts[1], "weight": 0.25}, parts[2]])(queries, documents, labels)
    torch.testing.assert_close(total, alone[0] + 0.25 * alone[1] + alone[2])
    for name, loss in zip(("infonce", "uniformity", "alignment"), alone, strict=True):
        torch.testing.assert_close(metrics[f"loss_{name}"], loss.detach())
    assert "accuracy" in metrics


def test_two_parts_of_one_name_are_logged_apart() -> None:
    objective = build_objective([{"type": "infonce"}, {"type": "infonce", "temperature": 1.0}])
    _, metrics = objective(*batch())
    assert metrics["loss_infonce"] != metrics["loss_infonce-2"]


def test_a_loss_is_a_contrastive_objective_by_its_name() -> None:
    queries, documents, labels = batch()
    short, _ = build_objective({"type": "infonce", "negatives": "all", "temperature": 0.2})(queries, documents, labels)
    block = {"type": "contrastive", "loss": {"type": "infonce", "negatives": "all"}, "temperature": 0.2}
    torch.testing.assert_close(short, build_objective(block)(queries, documents, labels)[0])


def test_matryoshka_wraps_a_part_of_a_sum() -> None:
    queries, documents, labels = batch()
    nested = {"type": "uniformity", "matryoshka": {"dims": [8, 4]}}
    total, _ = build_objective([{"type": "infonce"}, nested])(queries, documents, labels)
    cut = Embeddings(queries.vectors[:, :4]), Embeddings(documents.vectors[:, :4])
    expected = build_objective("infonce")(queries, documents, labels)[0]
    expected = expected + build_objective("uniformity")(queries, documents, labels)[0]
    torch.testing.assert_close(total, expected + build_objective("uniformity")(*cut, labels)[0])


def test_terms_take_the_best_positive_of_each_query() -> None:
    queries, documents, labels = batch(queries=2, group=3)
    labels = BatchLabels(
        labels.owner, torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 0.0]), *list(vars(labels).values())[2:]
    )  # the second query has none
    loss, _ = build_objective("alignment")(queries, documents, labels)
    q, p = functional.normalize(queries.vectors[0], dim=0), functional.normalize(documents.vectors[2], dim=0)
    torch.testing.assert_close(loss, (q - p).square().sum())


def test_the_monitors_see_pairs_and_no_false_negatives() -> None:
    queries, documents, labels = batch()
    same = labels.document_keys.clone()
    same[2] = same[0]  # the positives of the first two queries are one document
    labels = BatchLabels(labels.owner, labels.relevance, same, *list(vars(labels).values())[3:])
    objective = build_objective("alignment")
    view = objective.view(objective.gather(queries, documents, labels))
    assert view.similarities.shape == (5, 5) and view.relevance.equal(torch.eye(5))
    assert (~view.valid).nonzero().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], "the list is empty"),
        ([{"type": "infonce", "weight": 0}], r"objective\[0\].weight: found 0"),
        ([{"type": "infonce", "weight": "much"}], r"objective\[0\].weight: found 'much'"),
        ({"type": "infonce", "temprature": 1}, "'infonce': unknown option 'temprature'; did you mean 'temperature'"),
        ([{"type": "uniformity", "t": -1}], "uniformity.t: found -1"),
        ([{"type": "unifromity"}], "there is no 'unifromity'.*uniformity"),
    ],
)
def test_what_cannot_be_built_is_named(block, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


def test_terms_refuse_what_they_cannot_use() -> None:
    queries, documents, labels = batch(queries=1)
    with pytest.raises(ConfigError, match="'uniformity'.*'letters' gives 1 pairs a batch, it needs 2"):
        build_objective("uniformity")(queries, documents, labels)
    many = Embeddings(queries.vectors[:, None], torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ConfigError, match="'alignment' compares one vector an input"):
        build_objective("alignment")(many, documents, labels)


def test_a_config_takes_a_list_and_checks_each_part() -> None:
    config = build_config({"objective": ["infonce", {"type": "uniformity", "weight": 0.1}]})
    assert config.objective == ("infonce", {"type": "uniformity", "weight": 0.1})
    with pytest.raises(ConfigError, match="needs pooling 'multi_vector'"):
        build_config({"objective": ["infonce", {"type": "contrastive", "similarity": "maxsim"}]})
    with pytest.raises(ConfigError, match="no 'type'"):
        build_config({"objective": ["infonce", {"weight": 0.1}]})
