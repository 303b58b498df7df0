"""Objectives that read labels (SPACE-2, Dialog2Flow, MLCD, Hydra), against loops and numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmembed.data.labels import BatchLabels, label_keys, label_values
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import build_objective
from mmembed.objectives.aligned import generator_at
from mmembed.objectives.hydra import gated_similarity
from mmembed.objectives.label_paths import Classes, path_keys, tree_similarities
from tests.contract.options import write_vectors

# what dialogs say, as paths of domain, intent, slot, value
DIALOGS = [
    [("hotel", "inform", "area", "north"), ("hotel", "request")],
    [("hotel", "inform", "price")],
    [("taxi", "inform", "area", "north")],
    [("hotel", "bye")],
    [("hotel", "request"), ("hotel", "inform", "area", "north")],
    [],
]
SIZE = 6


def batch(labels=DIALOGS, seed: int = 0) -> tuple[Embeddings, Embeddings, BatchLabels]:
    """One positive a query, in float64."""
    count, generator = len(labels), torch.Generator().manual_seed(seed)
    keys = torch.arange(count).view(-1, 1).expand(-1, 2) + 1000
    position = torch.arange(count)
    of = BatchLabels(
        position,
        torch.ones(count),
        keys,
        position,
        keys.unsqueeze(1),
        source="letters",
        label_keys=label_keys(labels),
        label_values=label_values(labels),
    )
    sides = [torch.randn(count, SIZE, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    return Embeddings(sides[0]), Embeddings(sides[1]), of


def plain(*classes: str) -> list[list[tuple[str]]]:
    return [[(name,)] for name in classes]


def runs(paths, first: int, last: int) -> set[tuple[str, ...]]:
    return {path[first:last] for path in paths if len(path) >= last}


def agreement(a, b, levels: int = 4) -> list[float | None]:
    """Jaccard of each view, None where neither has a name there."""
    found = []
    for length in range(1, levels + 1):
        for first in range(levels - length + 1):
            one, other = runs(a, first, first + length), runs(b, first, first + length)
            found.append(len(one & other) / len(one | other) if one | other else None)
    return found


# Trees ----------------------------------------------------------------------------------------------------------------


def test_views_of_trees_against_sets() -> None:
    similarities, present = tree_similarities(label_keys(DIALOGS))
    assert similarities.shape == (10, 6, 6)
    for i, a in enumerate(DIALOGS):
        for j, b in enumerate(DIALOGS):
            expected = agreement(a, b)
            assert present[:, i, j].tolist() == [one is not None for one in expected]
            assert similarities[:, i, j].tolist() == pytest.approx([one or 0.0 for one in expected])


def test_the_score_of_two_dialogs_by_hand() -> None:
    """Domain 1, intent 1/2, domain-intent 1/2, and nothing in common in the other seven views."""
    similarities, present = tree_similarities(label_keys(DIALOGS[:2]))
    assert (similarities[:, 0, 1].sum() / present[:, 0, 1].sum()).item() == pytest.approx((1 + 0.5 + 0.5) / 10)


def test_padding_a_tree_adds_no_agreement() -> None:
    keys = label_keys(DIALOGS)
    wide, there = tree_similarities(functional.pad(keys, (0, 1, 0, 2)))
    narrow, here = tree_similarities(keys)
    torch.testing.assert_close(wide.sum(0), narrow.sum(0))
    assert torch.equal(there.sum(0), here.sum(0))


def reference_tree_supcon(vectors: torch.Tensor, weights, temperature: float) -> float:
    """(2 N, E) unit vectors, weights[i][j] of N samples."""
    count, total = len(vectors), 0.0
    scores = (vectors @ vectors.T / temperature).tolist()
    samples = count // 2
    for i in range(count):
        others = [j for j in range(count) if j != i]
        below = math.log(sum(math.exp(scores[i][j]) for j in others))
        shares = {j: weights[i % samples][j % samples] for j in others}
        total -= sum(share * (scores[i][j] - below) for j, share in shares.items()) / sum(shares.values())
    return total / count


def mean_agreement(a, b) -> float:
    known = [one for one in agreement(a, b) if one is not None]
    return sum(known) / len(known) if known else 0.0


def test_tree_supcon_against_loops() -> None:
    queries, documents, labels = batch()
    weights = [[1.0 if i == j else mean_agreement(a, b) for j, b in enumerate(DIALOGS)] for i, a in enumerate(DIALOGS)]
    loss, metrics = build_objective("tree_supcon", SIZE)(queries, documents, labels)
    vectors = functional.normalize(torch.cat([queries.vectors, documents.vectors]), dim=-1)
    assert loss.item() == pytest.approx(reference_tree_supcon(vectors, weights, 0.07), abs=1e-9)
    others = [weights[i][j] for i in range(6) for j in range(6) if i != j]
    assert metrics["label_agreement"].item() == pytest.approx(sum(others) / len(others))


def test_tree_supcon_in_subspaces_against_loops() -> None:
    queries, documents, labels = batch()
    objective = build_objective({"type": "tree_supcon", "subspace_size": 3}, SIZE).double()
    with torch.no_grad():
        objective.biases.normal_(generator=torch.Generator().manual_seed(1))
    both = torch.cat([queries.vectors, documents.vectors])
    losses = []
    for view in range(10):
        weights = [[agreement(a, b)[view] or 0.0 for b in DIALOGS] for a in DIALOGS]
        for i in range(6):
            weights[i][i] = 1.0
        vectors = torch.tanh(both @ objective.projections[view] + objective.biases[view])
        losses.append(reference_tree_supcon(functional.normalize(vectors, dim=-1), weights, 0.07))
    assert objective(queries, documents, labels)[0].item() == pytest.approx(sum(losses) / 10, abs=1e-9)


def test_one_level_is_supcon() -> None:
    """Labels without a tree: agreement is of one class or not."""
    queries, documents, labels = batch(plain("a", "b", "a", "c"))
    ids = torch.tensor([1, 2, 1, 3])
    keys = torch.stack([labels.document_keys[:, 0], ids], 1)
    told = replace(labels, document_keys=keys, positive_keys=keys.unsqueeze(1))
    expected, _ = build_objective("supcon")(queries, documents, told)
    torch.testing.assert_close(build_objective("tree_supcon")(queries, documents, labels)[0], expected)


# Labels in words ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Vectors of the labels "a", "b", "c" and "x/y"."""
    write_vectors(tmp_path, ("a", "b", "c", "x/y"), np.eye(4, dtype="float32") + np.float32(0.3))
    return tmp_path


@pytest.mark.parametrize("symmetric", [False, True])
def test_soft_labels_against_torch(folder, symmetric: bool) -> None:
    """The released code: cross-entropy with the softmax of the labels' cosines as target."""
    queries, documents, labels = batch([[("b",)], [("x", "y")], [("a",)], [("x/y",)]])
    block = {"type": "soft_labels", "vectors": str(folder), "symmetric": symmetric}
    loss, _ = build_objective(block)(queries, documents, labels)
    vectors = (torch.eye(4) + 0.3)[[1, 3, 0, 3]].double()
    targets = (functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1) / 0.25).softmax(1)
    scores = functional.cosine_similarity(queries.vectors[:, None], documents.vectors[None], dim=-1) / 0.05
    expected = functional.cross_entropy(scores, targets)
    if symmetric:
        expected = (expected + functional.cross_entropy(scores.T, targets)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_labels_of_near_words_are_pushed_apart_less(folder) -> None:
    """A query as near to all positives turns to those whose label is like its own."""
    write_vectors(folder, ("a", "b", "c", "x/y"), np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0]], dtype="float32"))
    labels, axes = batch(plain("a", "b", "c"))[2], torch.eye(3)
    queries = torch.ones(3, 3, requires_grad=True)
    loss, _ = build_objective({"type": "soft_labels", "vectors": str(folder)})(
        Embeddings(queries), Embeddings(axes), labels
    )
    loss.backward()
    pulled = (-queries.grad[0]).tolist()
    assert pulled[0] > pulled[1] > pulled[2]


# Clusters as classes --------------------------------------------------------------------------------------------------

CLUSTERED = [[("3",), ("0",)], [("3",), ("5",)], [("1",), ("0",)], [("6",)]]


def test_mlcd_against_loops() -> None:
    """With all classes in every step."""
    queries, documents, labels = batch(CLUSTERED)
    objective = build_objective({"type": "mlcd", "clusters": 8, "sampled": 1.0, "temperature": 0.5}, SIZE).double()
    loss, metrics = objective(queries, documents, labels)
    centres = functional.normalize(objective.weights, dim=1)
    sides = []
    for side in (queries, documents):
        for vector, own in zip(functional.normalize(side.vectors, dim=1), CLUSTERED, strict=True):
            scores = (centres @ vector / 0.5).tolist()
            mine = {int(name) for (name,) in own}
            push = math.log(1 + sum(math.exp(scores[k]) for k in range(8) if k not in mine))
            sides.append(push + math.log(1 + sum(math.exp(-scores[k]) for k in mine)))
    assert loss.item() == pytest.approx(sum(sides) / len(sides), abs=1e-9)
    assert metrics["labels"].item() == 7 / 4 and metrics["classes"] == 8


def test_mlcd_draws_others_and_keeps_the_classes_of_the_batch() -> None:
    objective = build_objective({"type": "mlcd", "clusters": 100, "sampled": 0.2, "seed": 1}, SIZE)
    wanted = torch.zeros(100, dtype=torch.bool)
    wanted[[3, 50, 99]] = True
    first = objective._draw(wanted)
    assert len(first) == 20 and {3, 50, 99} <= set(first.tolist())
    objective.keep(objective.step + 1)
    second = objective._draw(wanted)
    assert len(second) == 20 and {3, 50, 99} <= set(second.tolist()) and not torch.equal(first, second)
    objective.keep(objective.step * 0)
    assert torch.equal(objective._draw(wanted), first)  # as a resumed run would
    assert len(objective._draw(wanted | (torch.arange(100) < 60))) == 61  # all classes of the batch, if more


# Gates ----------------------------------------------------------------------------------------------------------------


def test_gated_similarity_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, positives, gates = (torch.rand(4, 5, generator=generator) + 0.1 for _ in range(3))
    expected = [
        [functional.cosine_similarity(gates[i] * queries[i], gates[i] * positives[j], dim=0).item() for j in range(4)]
        for i in range(4)
    ]
    torch.testing.assert_close(gated_similarity(queries, positives, gates), torch.tensor(expected))


@pytest.mark.parametrize("others", ["arbitrary", "identical", "distinct"])
def test_hydra_against_loops(others: str) -> None:
    classes = ["a", "b", "a", "c", "b", "b"]
    queries, documents, labels = batch(plain(*classes))
    block = {"type": "hydra", "classes": ["a", "b", "c"], "others": others, "label_size": 5, "gate_size": 7}
    objective = build_objective(block, SIZE).double()
    own = torch.tensor(["abc".index(name) for name in classes])
    wanted = objective._wanted(own)
    if others != "distinct":
        assert sorted(wanted.tolist()) == sorted(own.tolist())
    assert {"arbitrary": True, "identical": (wanted == own).all(), "distinct": (wanted != own).all()}[others]
    gates = objective.gate(own, wanted)
    assert ((gates > 0) & (gates < 1)).all()
    total, count = 0.0, 0
    for i in range(6):
        cosines = [
            functional.cosine_similarity(gates[i] * queries.vectors[i], gates[i] * document, dim=0).item() / 0.1
            for document in documents.vectors
        ]
        away = sum(math.exp(cosines[j]) for j in range(6) if own[j] not in (own[i], wanted[i]))
        for j in range(6):
            if own[j] == wanted[i]:
                total += math.log(math.exp(cosines[j]) + away) - cosines[j]
                count += 1
    loss, metrics = objective(queries, documents, labels)
    assert loss.item() == pytest.approx(total / count, abs=1e-9)
    assert metrics["positives"].item() == pytest.approx(count / 6)


def test_gates_against_the_layers_of_torch() -> None:
    """Rectifier, batch normalisation and linear, twice, of the mean of two class vectors."""
    block = {"type": "hydra", "classes": ["a", "b", "c"], "label_size": 5, "gate_size": 7}
    objective = build_objective(block, SIZE).double()
    nn, of = torch.nn, objective.gates
    first, second = nn.Linear(5, 7).double(), nn.Linear(7, SIZE).double()
    layers = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5), first, nn.ReLU(), nn.BatchNorm1d(7), second, nn.Sigmoid())
    for layer, number in ((first, 1), (second, 2)):
        layer.weight.data, layer.bias.data = of[f"weight_{number}"].data, of[f"bias_{number}"].data
    a, b = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 1, 0])
    expected = layers.double()((objective.class_vectors[a] + objective.class_vectors[b]) / 2)
    torch.testing.assert_close(objective.gate(a, b), expected)


def test_classes_of_a_file(tmp_path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b"]))
    assert build_objective({"type": "hydra", "classes": str(tmp_path / "labels.json")}, SIZE).count == 2


# What cannot be -------------------------------------------------------------------------------------------------------


def test_known_paths_are_found_and_others_not() -> None:
    known = Classes([("a",), ("a", "b"), ("b", "a")])
    keys = path_keys(label_keys([[("b", "a")], [("a", "b")], [("a",)], [("b",)], [("a", "b", "c")]]))
    assert known.find(keys).flatten().tolist() == [2, 1, 0, -1, -1]
    names = [f"name {i}" for i in range(50)]
    assert Classes((name, "below") for name in names).find(
        path_keys(label_keys([[(name, "below")] for name in names]))
    ).flatten().tolist() == list(range(50))  # products that wrap around


@pytest.mark.parametrize(
    ("block", "labels", "message"),
    [
        ({"type": "tree_supcon", "levels": 3}, DIALOGS, "'tree_supcon': a label of source 'letters' has 4 levels"),
        ({"type": "mlcd", "clusters": 5}, CLUSTERED, "'mlcd': a label of source 'letters' is no cluster.*0 to 4"),
        ({"type": "mlcd"}, [[("1",)], []], "'mlcd': a record of source 'letters' has no label"),
        ({"type": "hydra", "classes": ["a", "b"]}, plain("a", "c"), "'hydra': .*'letters' is none of the 2 classes"),
        (
            {"type": "hydra", "classes": ["a", "b"]},
            [[("a",), ("b",)], [("a",)]],
            "'hydra' takes one label a record, a record of source 'letters' has 2",
        ),
        ({"type": "hydra", "classes": ["a", "b"]}, plain("a"), "'hydra': source 'letters' gives 1 pairs"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_source_and_objective(block, labels, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block, SIZE)(*batch(labels))


def test_soft_labels_refuse_labels_without_a_vector_and_several(folder) -> None:
    objective = build_objective({"type": "soft_labels", "vectors": str(folder)})
    with pytest.raises(ConfigError, match="'soft_labels': a label of source 'letters' is none of the 4 ids in"):
        objective(*batch(plain("a", "d")))
    with pytest.raises(ConfigError, match="'soft_labels' takes one label a record, a record of source 'letters' has 0"):
        objective(*batch([[("a",)], []]))


def test_supremix_against_loops() -> None:
    """Two records share a positive: whatever their numbers, they are no negatives, and mix with none of the other."""
    numbers = [2.0, 1.0, 3.5, 2.0, 5.0, -1.0]
    queries, documents, labels = batch(plain(*map(str, numbers)))
    keys = labels.document_keys.clone()
    keys[4] = keys[0]
    labels = replace(labels, document_keys=keys, positive_keys=keys.unsqueeze(1))
    objective = build_objective({"type": "supremix", "temperature": 0.5, "seed": 3}, SIZE)
    draws = torch.rand(4, 12, 12, generator=generator_at(3, 0)).double()
    z = functional.normalize(torch.cat([queries.vectors, documents.vectors]), dim=1)
    y, twins, losses = numbers * 2, {0, 4, 6, 10}, []

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    for i in range(12):
        apart = [j for j in range(12) if j % 6 != i % 6 and not {i, j} <= twins]
        alike = [j for j in range(12) if j != i and y[j] == y[i]]
        unlike = [j for j in apart if y[j] != y[i]]
        share = float(draws[3, i, i])
        other = max(unlike, key=lambda j: draws[0, i, j])
        negatives = [(abs(y[i] - y[j]), z[j]) for j in unlike]
        negatives += [((1 - share) * abs(y[i] - y[other]), unit(share * z[i] + (1 - share) * z[other]))]
        positives = [z[j] for j in alike]
        below, above = [j for j in apart if y[j] < y[i]], [j for j in apart if y[j] > y[i]]
        if below and above:
            low, high = max(below, key=lambda j: draws[1, i, j]), max(above, key=lambda j: draws[2, i, j])
            part = (y[high] - y[i]) / (y[high] - y[low])
            assert part * y[low] + (1 - part) * y[high] == pytest.approx(y[i])
            positives.append(unit(part * z[low] + (1 - part) * z[high]))
        total = sum(torch.exp(z[i] @ p / 0.5) for p in positives)
        total = total + sum(weight * torch.exp(z[i] @ n / 0.5) for weight, n in negatives)
        losses.append(sum(total.log() - z[i] @ p / 0.5 for p in positives) / len(positives))
    loss, metrics = objective(queries, documents, labels)
    assert loss.item() == pytest.approx(float(sum(losses) / 12), rel=1e-5)
    assert 0 < metrics["mixed_positives"] < 1


def test_supremix_draws_anew_each_step_and_wants_numbers() -> None:
    of = batch(plain("1", "2", "3", "4"))
    objective = build_objective("supremix", SIZE)
    gathered = objective.gather(*of)
    first = objective.compare(gathered)[0].item()
    assert objective.compare(gathered)[0].item() == first
    objective.remember(gathered)
    objective.commit()
    assert objective.compare(gathered)[0].item() != first
    for labels in (plain("1", "2", "old", "4"), plain("1", "2", "nan", "4"), [*plain("1", "2", "3"), []]):
        with pytest.raises(
            ConfigError, match="'supremix': source 'letters' has records whose first label is no number"
        ):
            objective(*batch(labels))


@pytest.mark.parametrize("name", ["tree_supcon", "mlcd", "supremix"])
def test_sources_without_labels_are_refused(name: str) -> None:
    """In a batch, and before one is made."""

    def source_with(field: str) -> SimpleNamespace:
        return SimpleNamespace(name="letters", fields={field}, source=SimpleNamespace(in_batch_negatives=True))

    queries, documents, labels = batch()
    message = f"'{name}' compares labels, source 'letters' has none"
    with pytest.raises(ConfigError, match=message):
        build_objective(name, SIZE)(queries, documents, replace(labels, label_keys=None))
    with pytest.raises(ConfigError, match=message):
        build_objective(["uniformity", name]).check([source_with("negatives")])
    for field in ("labels", "classes"):
        build_objective(name).check([source_with(field)])


def write(folder, vectors, names) -> None:
    np.save(folder / "vectors.npy", vectors)
    (folder / "items.jsonl").write_text("\n".join(json.dumps({"id": name}) for name in names))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "cannot be read as a folder of `mmembed encode`"),
        (lambda folder: write(folder, np.zeros((2, 3), "int8"), ["a", "b"]), "holds int8 vectors of shape"),
        (lambda folder: write(folder, np.zeros((2, 3), "float32"), ["a"]), r"of shape \(2, 3\) and 1 names"),
        (lambda folder: write(folder, np.zeros((2, 3), "float32"), ["a", "a"]), "holds the label 'a' twice"),
    ],
)
def test_folders_that_hold_no_label_vectors(tmp_path, prepare, message) -> None:
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=rf"soft_labels.vectors: .*{message}"):
        build_objective({"type": "soft_labels", "vectors": str(tmp_path)})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("soft_labels", "soft_labels.vectors: missing; give the folder"),
        ("hydra", "hydra.classes: 0 labels"),
        ({"type": "hydra", "classes": ["a", "a"]}, "hydra.classes: 2 labels, 1 different ones"),
        ({"type": "hydra", "classes": "nowhere.json"}, "hydra.classes: nowhere.json cannot be read"),
        ({"type": "mlcd", "clusters": 1}, "mlcd.clusters: found 1"),
        ({"type": "proto_clip", "prototypes": 1}, "proto_clip.prototypes: found 1"),
        ({"type": "proto_clip", "prototypes": 9, "episode": 8}, "proto_clip.prototypes: 9 clusters of 8 pairs"),
        ({"type": "tree_supcon", "levels": 0}, "tree_supcon.levels: found 0"),
    ],
)
def test_options_that_cannot_be(block, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)
