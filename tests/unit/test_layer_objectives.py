"""Objectives over several decoder layers: equations by loops, names of layers, what is refused."""

import math

import pytest
import torch

from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError, MmembedError
from mmembed.objectives import build_objective
from mmembed.objectives.layers import layer_number
from tests.equivalence.toy import make_batch

DEPTH, SIZE = 4, 6


def sides(queries=3, per_query=2, layers=(1, 2, 3), several=False):
    """Unit vectors of each layer, float64."""
    generator = torch.Generator().manual_seed(0)

    def one(rows):
        shape = (rows, 3, SIZE) if several else (rows, SIZE)
        drawn = [torch.nn.functional.normalize(torch.randn(*shape, generator=generator).double(), dim=-1)
                 for _ in range(1 + len(layers))]  # fmt: skip
        mask = torch.tensor([True, True, False]).expand(rows, -1) if several else None
        return Embeddings(drawn[0], mask, dict(zip(layers, drawn[1:], strict=True)))

    return one(queries), one(queries * per_query), make_batch(queries, per_query, 10**6).labels


def info_nce(queries, documents, owner, relevance, temperature):
    """Loops over lists of numbers; the first positive of each query."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = []
        for document in documents:
            dot = sum(a * b for a, b in zip(query, document, strict=True))
            norms = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in document))
            scores.append(dot / norms / temperature)
        positive = next(j for j, of in enumerate(owner) if of == i and relevance[j] > 0)
        total -= scores[positive] - math.log(sum(math.exp(score) for score in scores))
    return total / len(queries)


def divergence(last, lower, temperature):
    total = 0.0
    for p, q in zip(last, lower, strict=True):
        weights = [[math.exp(x / temperature) for x in row] for row in (p, q)]
        target, found = [[w / sum(row) for w in row] for row in weights]
        total += sum(a * math.log(a / b) for a, b in zip(target, found, strict=True))
    return total / len(last)


@pytest.mark.parametrize("dims", [None, [6, 2]])
@pytest.mark.parametrize("kl", [{}, {"kl_weight": 0}, {"kl_weight": 2.0, "kl_temperature": 0.5}])
def test_the_sum_over_layers_by_loops(dims, kl):
    queries, documents, labels = sides()
    block = {"layers": [2, -1, -2], "layer_weights": [0.5, 1.0, 0.25], **kl}
    weights = {2: 0.5, None: 1.0, 3: 0.25}
    if dims:
        block |= {"dims": dims, "weights": [1.0, 3.0]}
    objective = build_objective({"type": "infonce", "temperature": 0.2, "matryoshka": block}, SIZE, DEPTH)
    assert objective.layers == {2, 3}
    loss, metrics = objective(queries, documents, labels)
    expected, a, t = 0.0, kl.get("kl_weight", 1.0), kl.get("kl_temperature", 0.3)
    for layer, weight in weights.items():
        q, d = (one.at(layer).vectors.tolist() for one in (queries, documents))
        for size, of_size in zip(dims or [SIZE], [1.0, 3.0], strict=False):
            cut = [[row[:size] for row in side] for side in (q, d)]
            expected += weight * of_size * info_nce(*cut, labels.owner.tolist(), labels.relevance.tolist(), 0.2)
        last = [*queries.vectors.tolist(), *documents.vectors.tolist()]
        expected += weight * a * t * divergence(last, [*q, *d], t)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {"loss_layer_2", "loss_layer_3", "loss_layer_last"} <= metrics.keys()
    assert ("kl_layer_2" in metrics) == (a > 0) and "kl_layer_last" not in metrics


def test_alignment_has_no_gradient_into_the_last_layer():
    queries, documents, labels = sides()
    found = []
    for kl_weight in (0, 5.0):
        leaves = [
            one.with_tensors([tensor.clone().requires_grad_() for tensor in one.tensors])
            for one in (queries, documents)
        ]
        block = {"layers": [2, -1], "kl_weight": kl_weight}
        build_objective({"type": "infonce", "matryoshka": block}, SIZE, DEPTH)(*leaves, labels)[0].backward()
        found.append([(one.vectors.grad, one.layers[2].grad, one.layers[1].grad) for one in leaves])
    for without, aligned in zip(*found, strict=True):
        assert torch.equal(without[0], aligned[0]) and not torch.allclose(without[1], aligned[1], atol=1e-3)
        assert aligned[2] is None


def test_several_vectors_an_input():
    """Padding vectors take no part in the alignment."""
    queries, documents, labels = sides(several=True)
    block = {"type": "infonce", "matryoshka": {"layers": [2, -1]}}
    loss, metrics = build_objective(block, SIZE, DEPTH)(queries, documents, labels)
    single = build_objective("infonce")
    by_hand = sum(single(queries.at(layer), documents.at(layer), labels)[0] for layer in (2, None))
    last, lower = (
        torch.cat([side.at(layer).vectors[side.mask] for side in (queries, documents)]).tolist() for layer in (None, 2)
    )
    distance = divergence(last, lower, 0.3)
    assert metrics["kl_layer_2"].item() == pytest.approx(distance, rel=1e-6)
    assert loss.item() == pytest.approx(by_hand.item() + 0.3 * distance, rel=1e-6)


def test_a_part_of_a_list_compares_its_layer():
    queries, documents, labels = sides()
    blocks = [{"type": "uniformity", "layer": 1, "weight": 2.0}, "infonce", {"type": "infonce", "layer": "middle"}]
    objective = build_objective(blocks, SIZE, DEPTH)
    loss, metrics = objective(queries, documents, labels)
    of = {name: build_objective(name, SIZE) for name in ("uniformity", "infonce")}
    expected = {
        "uniformity": of["uniformity"](queries.at(1), documents.at(1), labels)[0],
        "infonce": of["infonce"](queries, documents, labels)[0],
        "infonce-2": of["infonce"](queries.at(2), documents.at(2), labels)[0],
    }
    assert objective.layers == {1, 2}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[f"loss_{name}"], value)
    torch.testing.assert_close(loss, 2 * expected["uniformity"] + expected["infonce"] + expected["infonce-2"])
    view = objective.view(objective.gather(queries, documents, labels))
    torch.testing.assert_close(view.similarities, queries.vectors @ documents.vectors.T)


def test_health_monitors_see_the_last_layer():
    queries, documents, labels = sides()
    whole = build_objective("infonce")
    expected = whole.view(whole.gather(queries, documents, labels))
    for kl_weight, chance in ((0, 4.0), (1.0, None)):
        block = {"layers": [2, -1], "layer_weights": [3.0, 1.0], "kl_weight": kl_weight}
        objective = build_objective({"type": "infonce", "matryoshka": block}, SIZE, DEPTH)
        view = objective.view(objective.gather(queries, documents, labels))
        torch.testing.assert_close(view.similarities, expected.similarities)
        assert (
            view.chance is None
            if chance is None
            else view.chance.item() == pytest.approx(chance * expected.chance.item())
        )


def test_layers_of_every_entry_by_task():
    block = {"by_task": {"sts": ["pearson", {"type": "thresholded_infonce", "layer": "middle"}],
                         "retrieval": {"type": "infonce", "matryoshka": {"layers": [3, -1]}}}}  # fmt: skip
    objective = build_objective(block, SIZE, DEPTH)
    assert objective.layers == {2, 3}
    queries, documents, labels = sides()
    assert torch.isfinite(objective(queries, documents, labels)[0])


@pytest.mark.parametrize(
    ("layer", "depth", "number"),
    [(1, 2, 1), (2, 2, None), (-1, 2, None), (-2, 2, 1), ("middle", 28, 14), ("middle", 5, 3), ("middle", 1, None)],
)
def test_numbers(layer, depth, number):
    assert layer_number(layer, depth, "x") == number


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "infonce", "layer": 2}, "objective 'infonce'.layer: the embedder gives the vectors of"),
        ([{"type": "infonce", "layer": 2}], "every part has a lower layer"),
        (["infonce", {"type": "infonce", "layer": 5}], r"objective\[1\].layer: found 5; the decoder has 4 layers"),
        (["infonce", {"type": "infonce", "layer": -5}], r"objective\[1\].layer: found -5; the decoder has 4 layers"),
        (["infonce", {"type": "infonce", "layer": "midle"}], r"objective\[1\].layer: found 'midle'"),
        (["infonce", {"type": "infonce", "layer": True}], r"objective\[1\].layer: found True"),
        (
            ["infonce", {"type": "infonce", "layer": 2, "matryoshka": {"layers": [1, -1]}}],
            r"objective\[1\].layer: the part has matryoshka.layers, too",
        ),
        ({"matryoshka": {"layers": [1, 3]}}, r"layers: found \[1, 3\]; add the last, 4"),
        ({"matryoshka": {"layers": [2, -3, -1]}}, r"found \[2, -3, -1\]; give two or more distinct"),
        ({"matryoshka": {"layers": [-1]}}, r"found \[-1\]; give two or more distinct"),
        ({"matryoshka": {"layers": [0, -1]}}, "layers: found 0; the decoder has 4 layers"),
        ({"matryoshka": {"layers": ["2", -1]}}, r"matryoshka.layers: found '2'"),
        ({"matryoshka": {"layers": [2, -1], "layer_weights": [1]}}, "1 layer_weights for 2 layers"),
        ({"matryoshka": {"layers": [2, -1], "layer_weights": [0, 1]}}, "layer_weights: found 0"),
        ({"matryoshka": {"layers": [2, -1], "layer_weigths": [1, 1]}}, "did you mean 'layer_weights'"),
        ({"matryoshka": {"layers": [2, -1], "weights": [1]}}, "weights: has no effect without dims"),
        ({"matryoshka": {"dims": [4], "kl_weight": 1}}, "kl_weight: has no effect without layers"),
        ({"matryoshka": {"dims": [4], "layer_weights": [1]}}, "layer_weights: has no effect without layers"),
        ({"matryoshka": {"layers": [2, -1], "kl_weight": 0, "kl_temperature": 0.3}}, "has no effect with kl_weight 0"),
        ({"matryoshka": {"layers": [2, -1], "kl_weight": -1}}, "kl_weight: found -1"),
        ({"type": "negative_queue", "matryoshka": {"layers": [2, -1]}}, "'negative_queue' remembers numbers"),
        ({"type": "isogclr", "matryoshka": {"layers": [2, -1]}}, "'isogclr' remembers numbers of past vectors"),
    ],
)  # fmt: skip
def test_what_is_refused(block, message):
    block = {"type": "contrastive", **block} if isinstance(block, dict) else block
    with pytest.raises(ConfigError, match=message):
        build_objective(block, SIZE, DEPTH)


def test_a_memory_may_be_of_one_lower_layer():
    objective = build_objective(["infonce", {"type": "negative_queue", "layer": 2, "size": 4}], SIZE, DEPTH)
    queries, documents, labels = (one.float() if isinstance(one, torch.Tensor) else one for one in sides())
    gathered = objective.gather(queries, documents, labels)
    objective.remember(gathered)
    objective.commit()
    queue = objective.parts[1].objective.queue
    assert int(queue.seen) == 3
    torch.testing.assert_close(queue.vectors[:3], documents.layers[2][::2].float())


def test_a_config_is_checked_without_a_depth():
    """Before the backbone is known: what can be told is refused, and the rest later."""
    objective = build_objective(["infonce", {"type": "infonce", "layer": 99}])
    queries, documents, labels = sides()
    with pytest.raises(MmembedError, match=r"layer 99: the model gave the vectors of \[1, 2, 3\]"):
        objective(queries, documents, labels)
    with pytest.raises(MmembedError, match="layer 2: the model gave the vectors of its last layer alone"):
        queries._replace(layers=None).at(2)
    build_objective({"type": "infonce", "matryoshka": {"layers": ["middle", -7, -1]}})
    with pytest.raises(ConfigError, match="found 0"):
        build_objective({"type": "infonce", "matryoshka": {"layers": [0, -1]}})
