"""The language-model loss as an objective: what it adds up, where it may stand, what is logged."""

from __future__ import annotations

import pytest
import torch

from mmembed.config import build_config
from mmembed.content import Task
from mmembed.errors import ConfigError, MmembedError
from mmembed.objectives import build_objective
from tests.unit.test_combined_objectives import batch

INFONCE = {"type": "infonce", "temperature": 0.1}


def told(embeddings, generator, none=False):
    """Embeddings with losses of up to 5 tokens an input."""
    predicted = torch.randint(0, 5, (len(embeddings.vectors),), generator=generator) * (not none)
    nll = torch.rand(len(predicted), generator=generator) * predicted
    return embeddings._replace(nll=nll.requires_grad_(), predicted=predicted)


def told_batch(none=False):
    queries, documents, labels = batch()
    generator = torch.Generator().manual_seed(1)
    return told(queries, generator, none), told(documents, generator, none), labels


@pytest.mark.parametrize("sides", ["documents", "queries", "both"])
def test_the_loss_is_the_mean_over_tokens_of_the_asked_sides(sides):
    queries, documents, labels = told_batch()
    chosen = {"documents": [documents], "queries": [queries], "both": [queries, documents]}[sides]
    losses = [loss for side in chosen for loss in side.nll.tolist()]
    tokens = sum(count for side in chosen for count in side.predicted.tolist())
    alone = build_objective(INFONCE)(queries, documents, labels)[0].item()
    objective = build_objective([INFONCE, {"type": "captioning", "sides": sides, "weight": 0.25}])
    total, metrics = objective(queries, documents, labels)
    assert metrics["loss_captioning"].item() == pytest.approx(sum(losses) / tokens)
    assert metrics["perplexity"].item() == pytest.approx(torch.tensor(sum(losses) / tokens).exp().item())
    assert total.item() == pytest.approx(alone + 0.25 * sum(losses) / tokens)
    total.backward()
    for side in (queries, documents):
        if any(side is one for one in chosen):
            assert side.nll.grad.tolist() == pytest.approx([0.25 / tokens] * len(side.nll))
        else:
            assert side.nll.grad is None


def test_a_batch_without_texts_costs_nothing():
    queries, documents, labels = told_batch(none=True)
    total, metrics = build_objective([INFONCE, "captioning"])(queries, documents, labels)
    total.backward()
    assert metrics["loss_captioning"] == 0 and torch.isfinite(total)
    assert torch.isfinite(documents.vectors.grad).all()


def test_it_may_stand_first_and_monitors_look_at_the_other():
    queries, documents, labels = told_batch()
    objective = build_objective(["captioning", INFONCE])
    expected = build_objective(INFONCE)
    view = objective.view(objective.gather(queries, documents, labels))
    of_other = expected.view(expected.gather(queries, documents, labels))
    assert torch.equal(view.similarities, of_other.similarities)
    assert torch.equal(objective.similarity_of(queries, documents), expected.similarity_of(queries, documents))


def test_graded_pairs_may_have_it():
    objective = build_objective(["captioning", "pearson"])
    assert objective.pairs and objective.predicts == {"document"}


def test_each_source_says_what_is_predicted():
    objective = build_objective(
        {"by_task": {"retrieval": [INFONCE, {"type": "captioning", "sides": "queries"}], "sts": "pearson"}}
    )
    assert objective.predicts == {"query"}
    assert objective.part_for("any", Task.RETRIEVAL).predicts == {"query"}
    assert objective.part_for("any", Task.STS).predicts == frozenset()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("captioning", "'captioning': looks at no vectors, and an embedder needs"),
        (["captioning"], "'captioning': looks at no vectors, and an embedder needs"),
        ({"by_task": {"retrieval": "captioning"}}, "by_task.retrieval: objective 'captioning': looks at no vectors"),
        ([INFONCE, {"type": "captioning", "matryoshka": {"dims": [4]}}], "matryoshka has nothing to cut"),
        (
            [INFONCE, {"type": "captioning", "sides": "query"}],
            "captioning.sides: there is no 'query'; did you mean 'queries'?",
        ),
        ([INFONCE, {"type": "captioning", "layer": 1}], r"objective\[1\].layer: 'captioning' looks at the last layer"),
        ([INFONCE, {"type": "captioning", "side": "both"}], "unknown option 'side'; did you mean 'sides'?"),
    ],
)
def test_refusals(block, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


def test_vectors_alone_are_an_error():
    with pytest.raises(MmembedError, match="come without what their tokens cost"):
        build_objective([INFONCE, "captioning"])(*batch())


def test_the_config_takes_it():
    config = build_config({"data": {"train": [{"path": "x"}]}, "objective": [INFONCE, "captioning"]})
    assert build_objective(config.objective).predicts == {"document"}
