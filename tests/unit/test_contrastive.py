"""The contrastive objective: masks, margins, temperatures, against plain loops."""

import dataclasses
import math

import pytest
import torch

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import Loss
from mmembed.objectives import build_objective


def make_labels(owner, relevance, keys=None, query_keys=None, in_batch=True, extra=()):
    """`extra`: a known positive of each query beside the first one in the batch."""
    count = len(owner)
    keys = keys if keys is not None else list(range(100, 100 + count))
    first = {i: next(keys[j] for j in range(count) if owner[j] == i and relevance[j] > 0) for i in set(owner)}
    return BatchLabels(
        owner=torch.tensor(owner),
        relevance=torch.tensor(relevance, dtype=torch.float64),
        document_keys=torch.tensor([[key, key + 5000] for key in keys]),
        query_keys=torch.tensor(query_keys if query_keys is not None else list(range(max(owner) + 1))),
        positive_keys=torch.tensor(
            [[[key, key + 5000], [extra[i], -1] if extra else [key, -1]] for i, key in sorted(first.items())]
        ),
        in_batch=in_batch,
    )


def embed(count, size=5, seed=0):
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Embeddings(vectors)


def looped_loss(queries, documents, owner, relevance, temperature, skip=lambda i, j: False):
    """In-batch InfoNCE with one positive a query, by the definition."""
    losses = []
    for i in range(len(queries)):
        cosine = [
            float(queries[i] @ documents[j] / queries[i].norm() / documents[j].norm()) for j in range(len(documents))
        ]
        (positive,) = (j for j in range(len(documents)) if owner[j] == i and relevance[j] > 0)
        others = [j for j in range(len(documents)) if j != positive and not skip(i, j)]
        scores = {j: math.exp(cosine[j] / temperature) for j in [positive, *others]}
        losses.append(-math.log(scores[positive] / sum(scores.values())))
    return sum(losses) / len(losses)


OWNER, RELEVANCE = [0, 0, 1, 1, 2, 2], [1, 0, 1, 0, 1, 0]


def test_in_batch_with_hard_negatives():
    queries, documents = embed(3), embed(6, seed=1)
    loss, metrics = build_objective({"type": "contrastive", "temperature": 0.3})(
        queries, documents, make_labels(OWNER, RELEVANCE)
    )
    assert loss.item() == pytest.approx(looped_loss(queries.vectors, documents.vectors, OWNER, RELEVANCE, 0.3))
    assert metrics["negatives"].item() == 5


def test_without_in_batch_negatives_only_the_own_group_counts():
    queries, documents = embed(3), embed(6, seed=1)
    loss, metrics = build_objective({"type": "contrastive", "temperature": 0.3})(
        queries, documents, make_labels(OWNER, RELEVANCE, in_batch=False)
    )
    expected = looped_loss(queries.vectors, documents.vectors, OWNER, RELEVANCE, 0.3, skip=lambda i, j: OWNER[j] != i)
    assert loss.item() == pytest.approx(expected)
    assert metrics["negatives"].item() == 1


@pytest.mark.parametrize("mask", [True, False])
def test_other_queries_documents_that_are_no_negatives(mask):
    """Document 2 has the content of query 0's positive; query 2 has the content of query 1; document 5 is query 0."""
    queries, documents = embed(3), embed(6, seed=1)
    keys, query_keys = [100, 101, 100, 103, 104, 7], [7, 8, 8]
    masked = {(0, 2), (1, 0), (1, 4), (2, 2), (0, 5)} if mask else set()
    loss, _ = build_objective({"type": "contrastive", "temperature": 0.3, "mask_duplicates": mask})(
        queries, documents, make_labels(OWNER, RELEVANCE, keys, query_keys)
    )
    expected = looped_loss(
        queries.vectors, documents.vectors, OWNER, RELEVANCE, 0.3, skip=lambda i, j: (i, j) in masked
    )
    assert loss.item() == pytest.approx(expected)


def test_a_positive_that_was_not_drawn_is_no_negative_either():
    """Document 2 (query 1's positive) is also relevant to query 0, which drew another positive into the batch."""
    queries, documents = embed(3), embed(6, seed=1)
    loss, _ = build_objective({"type": "contrastive", "temperature": 0.3})(
        queries, documents, make_labels(OWNER, RELEVANCE, extra=[102, 102, 104])
    )
    expected = looped_loss(
        queries.vectors, documents.vectors, OWNER, RELEVANCE, 0.3, skip=lambda i, j: (i, j) == (0, 2)
    )
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_false_negative_margin(margin):
    queries, documents = embed(3, seed=3), embed(6, seed=4)
    cosine = torch.nn.functional.normalize(queries.vectors, dim=1) @ torch.nn.functional.normalize(documents.vectors).T
    positive = {0: 0, 1: 2, 2: 4}
    loss, _ = build_objective({"type": "contrastive", "temperature": 0.3, "false_negative_margin": margin})(
        queries, documents, make_labels(OWNER, RELEVANCE)
    )
    expected = looped_loss(
        queries.vectors,
        documents.vectors,
        OWNER,
        RELEVANCE,
        0.3,
        skip=lambda i, j: cosine[i, j] > cosine[i, positive[i]] + margin,
    )
    assert loss.item() == pytest.approx(expected)


def test_symmetric_is_the_mean_of_both_directions():
    queries, documents = embed(3), embed(3, seed=1)
    labels = make_labels([0, 1, 2], [1, 1, 1])
    one_way = build_objective({"type": "contrastive", "temperature": 0.3})
    there, _ = one_way(queries, documents, labels)
    back, _ = one_way(documents, queries, labels)
    both, _ = build_objective({"type": "contrastive", "temperature": 0.3, "symmetric": True})(
        queries, documents, labels
    )
    assert both.item() == pytest.approx((there.item() + back.item()) / 2)


def test_symmetric_leaves_out_the_direction_that_has_no_negatives():
    """Without in-batch negatives a document meets its own query alone: averaging in that 0 would halve the gradient."""
    queries, documents = embed(3), embed(6, seed=1)
    labels = make_labels(OWNER, RELEVANCE, in_batch=False)
    one_way, _ = build_objective({"type": "contrastive", "temperature": 0.3})(queries, documents, labels)
    both, _ = build_objective({"type": "contrastive", "temperature": 0.3, "symmetric": True})(
        queries, documents, labels
    )
    assert both.item() == pytest.approx(one_way.item())


def test_a_learned_temperature_leaves_its_floor_again():
    """Where a step pushed it below, the next loss uses the floor and its gradient still moves the parameter."""
    objective = build_objective({"type": "contrastive", "temperature": {"value": 0.05, "learn": True}})
    with torch.no_grad():
        objective.temperature.log_scale.fill_(20.0)
    queries = embed(3)
    wrong = Embeddings(-queries.vectors)  # far too sure of what is wrong: the temperature has to rise
    loss, _ = objective(queries, wrong, make_labels([0, 1, 2], [1, 1, 1]))
    loss.backward()
    torch.optim.SGD(objective.parameters(), lr=1e-3).step()
    assert 0 < objective.temperature.log_scale.item() < math.log(100)


def test_learned_temperature_has_a_gradient_and_a_floor():
    objective = build_objective({"type": "contrastive", "temperature": {"value": 0.05, "learn": True}})
    loss, metrics = objective(embed(3), embed(3, seed=1), make_labels([0, 1, 2], [1, 1, 1]))
    loss.backward()
    assert objective.temperature.log_scale.grad.abs() > 0
    assert metrics["temperature"].item() == pytest.approx(0.05)
    with torch.no_grad():
        objective.temperature.log_scale.fill_(20.0)
    assert objective.temperature.scale().item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "contrastive", "temprature": 1}, "temperature"),
        ({"type": "contrastiv"}, "contrastive"),
        ({"type": "contrastive", "loss": "infonc"}, "infonce"),
        ({"type": "contrastive", "temperature": 0}, "above 0"),
        ({"type": "contrastive", "temperature": {"value": 0.05, "lern": True}}, "learn"),
        ({"type": "contrastive", "similarity": "cosin"}, "cosine"),
        ({"type": "contrastive", "false_negative_margin": -0.1}, "0 or more"),
        ({"type": "contrastive", "matryoshka": {"dims": [512]}}, "embedding size 256"),
        ({"type": "contrastive", "matryoshka": {"dims": [64, 64]}}, "distinct"),
        ({"type": "contrastive", "matryoshka": {"dims": [64], "weights": [1, 2]}}, "one weight a dim"),
        ({"type": "contrastive", "matryoshka": {"dims": [64], "wieghts": [1]}}, "weights"),
        ({"type": "contrastive", "matryoshka": [64]}, "dims"),
    ],
)
def test_a_wrong_block_is_refused_with_the_remedy(block, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(block, embedding_size=256)


class Student(Loss):
    """Squared distance to the teacher's scores, where there are any."""

    name = "student"
    reads = frozenset({"score"})

    def forward(self, scores):
        known = ~scores.targets.isnan()
        self.seen = scores.targets
        return torch.where(known, scores.values - scores.targets.nan_to_num(), 0.0).square().sum(1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_loss_that_reads_scores_gets_the_teachers(symmetric):
    """Each query's own documents have a target in both directions, the others have none."""
    objective = build_objective({"type": "contrastive", "temperature": 1.0, "symmetric": symmetric})
    objective.loss = Student()
    labels = make_labels([0, 0, 1], [1, 0, 1])
    given = torch.tensor([3.0, math.nan, -2.0], dtype=torch.float64)
    queries, documents = embed(2), embed(3, seed=1)
    gathered = objective.gather(queries, documents, dataclasses.replace(labels, scores=given))
    nan = math.nan
    torch.testing.assert_close(gathered.targets, torch.tensor([[3, nan, nan], [nan, nan, -2]]).double(), equal_nan=True)
    loss, _ = objective.compare(gathered)
    cosine = objective.similarity_of(queries, documents)
    forward = ((cosine[0, 0] - 3) ** 2 + (cosine[1, 2] + 2) ** 2) / 2
    assert loss.item() == pytest.approx(forward.item())  # the reverse direction has the same two cells and two rows
    if symmetric:
        expected = torch.tensor([[3, nan], [nan, -2]]).double()
        torch.testing.assert_close(objective.loss.seen, expected, equal_nan=True)
    assert objective.gather(queries, documents, labels).targets.isnan().all()


def test_a_loss_that_reads_no_scores_is_given_none():
    labels = dataclasses.replace(make_labels([0, 0, 1], [1, 0, 1]), scores=torch.ones(3))
    assert build_objective("contrastive").gather(embed(2), embed(3, seed=1), labels).targets is None
