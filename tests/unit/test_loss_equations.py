"""Losses over scores against their equations written with plain loops, and what their shortcuts must not change."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from mmembed.config import build_config
from mmembed.data.dataset import RecordDataset
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Scores, mann_whitney, soft_top_k
from mmembed.losses.wasserstein import squared_distance
from mmembed.objectives import build_objective
from tests.unit.test_contrastive import embed, make_labels

NAN = math.nan


def ragged(seed: int = 0, rows: int = 6, columns: int = 11, dtype: torch.dtype = torch.float64) -> Scores:
    """One to three positives a row, some candidates not valid, a teacher's score for most; row 0 has no positive."""
    draw = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, columns, generator=draw, dtype=torch.float64) * 3).to(dtype)
    relevance = torch.zeros(rows, columns, dtype=dtype)
    for row in range(1, rows):
        relevance[row, torch.randperm(columns, generator=draw)[: 1 + row % 3]] = 1
    valid = (torch.rand(rows, columns, generator=draw) < 0.8) | (relevance > 0)
    targets = torch.rand(rows, columns, generator=draw, dtype=torch.float64).to(dtype)
    return Scores(values.requires_grad_(), relevance, valid, targets.masked_fill(targets < 0.2, NAN))


def cells(scores: Scores, row: int, mask: torch.Tensor) -> list[int]:
    return mask[row].nonzero().squeeze(1).tolist()


def average(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


# Mann-Whitney ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mann_whitney_compares_with_the_negatives_of_all_rows(reduction: str) -> None:
    scores = ragged()
    pool = scores.values[scores.negative].tolist()
    expected = [
        average([sum(math.log1p(math.exp(other - own)) for other in pool) for own in row[positive].tolist()])
        for row, positive in zip(scores.values, scores.positive, strict=True)
    ]
    if reduction == "mean":
        expected = [number / len(pool) for number in expected]
    loss = LOSSES.build({"type": "mann_whitney", "reduction": reduction})
    assert loss(scores).tolist() == pytest.approx(expected)


def test_mann_whitney_bounds_the_area_under_the_curve() -> None:
    for seed in range(5):
        scores = ragged(seed)
        own, others = scores.values[scores.positive], scores.values[scores.negative]
        wrong = (own[:, None] < others[None, :]).double().mean()
        weights = scores.positive.double() / scores.positive.sum(1, keepdim=True).clamp_min(1)
        alike = Scores(scores.values, scores.relevance, scores.valid)
        total = LOSSES.build("mann_whitney")(alike) * (weights.sum(1) * scores.positive.sum(1))
        assert wrong <= total.sum() / len(own) / math.log(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("block", [3, 40, 2**22])
def test_mann_whitney_in_cells_is_mann_whitney_one_by_one(monkeypatch, dtype, tolerance: float, block: int) -> None:
    scores = ragged(rows=40, columns=60, dtype=dtype)
    loss = LOSSES.build("mann_whitney")
    weights = torch.rand(40, dtype=dtype)
    exact = loss(scores)
    (gradient,) = torch.autograd.grad((exact * weights).sum(), scores.values)
    monkeypatch.setattr(mann_whitney, "COMPARISONS", 0)
    monkeypatch.setattr(mann_whitney, "BLOCK", block)
    assert mann_whitney._cells(scores.values[scores.positive], scores.values, scores.negative) is not None
    found = loss(scores)
    (gradient_found,) = torch.autograd.grad((found * weights).sum(), scores.values)
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient_found, gradient, rtol=tolerance * 10, atol=1e-9)


def test_mann_whitney_in_cells_where_all_negatives_are_equal(monkeypatch) -> None:
    values = torch.zeros(5, 9, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(mann_whitney, "COMPARISONS", 0)
    scores = Scores(values, torch.eye(5, 9).double(), torch.ones(5, 9, dtype=torch.bool))
    losses = LOSSES.build("mann_whitney")(scores)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    (gradient,) = torch.autograd.grad(losses.mean(), values)
    torch.testing.assert_close(gradient[scores.negative], torch.full((40,), 0.5 / 40).double())


# Wasserstein ----------------------------------------------------------------------------------------------------------


def test_wasserstein_of_one_query_is_the_distance_of_its_distributions() -> None:
    scores = Scores(torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[2.0, 0.0, 1.0]]), torch.ones(1, 3).bool())
    expected = (scores.values.softmax(1) - scores.relevance.softmax(1)).square().sum()
    torch.testing.assert_close(LOSSES.build("wasserstein")(scores), expected[None])


def test_wasserstein_is_the_distance_of_gaussians_by_the_square_root_of_matrices() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(40, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)

    def root(matrix: torch.Tensor) -> torch.Tensor:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(eigenvalues.clamp_min(0).sqrt()) @ vectors.T

    cross = root(root(cov_x) @ cov_y @ root(cov_x)).trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    assert squared_distance(x, y).item() == pytest.approx(expected.item())


def test_wasserstein_has_a_gradient_at_equal_singular_values() -> None:
    """Queries that are alike up to the order of columns; autograd through a decomposition divides by 0 there."""
    y = torch.eye(4, 8, dtype=torch.float64) * 0.5 + 0.1
    x = (torch.eye(4, 8, dtype=torch.float64) * 0.3 + 0.1).requires_grad_()
    singular = torch.linalg.svdvals((y - y.mean(0)) @ (x - x.mean(0)).T)
    assert (singular[0] - singular[2]).abs() < 1e-12 and singular[3] < 1e-12
    torch.autograd.gradcheck(lambda given: squared_distance(given, y), x, eps=1e-6, atol=1e-6)


def test_wasserstein_without_spread_of_grades_is_the_mean_and_the_spread_of_scores() -> None:
    """Grades in one order: the covariance of the targets is 0 and the nuclear norm that of a zero matrix."""
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y = torch.rand(1, 5, dtype=torch.float64).expand(3, -1)
    loss = squared_distance(x, y)
    expected = (x.mean(0) - y[0]).square().sum() + x.var(0).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(of, x)[0] for of in (loss, expected)))


def test_wasserstein_does_not_know_which_query_a_row_belongs_to() -> None:
    scores = ragged()
    swapped = Scores(scores.values[[0, 2, 1, 3, 4, 5]], scores.relevance, torch.ones_like(scores.valid))
    straight = Scores(scores.values, scores.relevance, torch.ones_like(scores.valid))
    torch.testing.assert_close(*(LOSSES.build("wasserstein")(of) for of in (swapped, straight)))


def test_wasserstein_without_other_queries_columns_is_a_squared_error_by_query() -> None:
    values, valid = ragged(rows=3, columns=12).values.detach(), torch.zeros(3, 12, dtype=torch.bool)
    relevance = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64).repeat(3, 3)
    for row in range(3):
        valid[row, 4 * row : 4 * row + 4] = True
    errors = [
        (values[row, valid[row]].softmax(0) - relevance[row, valid[row]].softmax(0)).square().sum() for row in range(3)
    ]
    found = LOSSES.build("wasserstein")(Scores(values, relevance * valid, valid))
    assert found.tolist() == pytest.approx([(1 + 1 / 3) * float(sum(errors)) / 3] * 3)


def test_wasserstein_says_that_scores_are_not_finite() -> None:
    queries, documents = embed(3), embed(6, seed=1)
    queries.vectors.data[1, 0] = NAN
    objective = build_objective("wasserstein")
    with pytest.raises(ConfigError, match="losses.wasserstein: the scores of 1 of 3 queries are not finite"):
        objective(queries, documents, make_labels([0, 0, 1, 1, 2, 2], [2, 1] * 3))


# Soft top-k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_of_the_soft_top_k_stands_in_the_middle_of_a_gap(dtype) -> None:
    """There the sum is k to all digits of float32 for t from 5 to 15: 3 e^(2 (t - 20)) = 3 e^(-2 t) has t = 10."""
    values = torch.tensor([[0.0, 0.0, 0.0, 20.0, 20.0, -20.0, -20.0, -20.0, 7.0]], dtype=dtype, requires_grad=True)
    valid = torch.tensor([[True] * 8 + [False]])
    torch.testing.assert_close(soft_top_k.solve(values.detach(), valid, 5, 2.0), torch.tensor([10.0], dtype=dtype))
    relevance = torch.zeros(1, 9, dtype=dtype).index_fill_(1, torch.tensor([7]), 1.0)
    loss = LOSSES.build({"type": "soft_top_k", "k": 5})(Scores(values, relevance, valid))
    torch.testing.assert_close(loss, torch.tensor([20.0], dtype=dtype))  # softplus(-2 (-20 + 10))
    loss.sum().backward()
    # v is e^-20 in six cells, a sixth of the sum each; the positive's own score counts twice
    sixth = 2 / 6
    expected = torch.tensor([[sixth, sixth, sixth, 0, 0, sixth, sixth, sixth - 2, 0]], dtype=dtype)
    torch.testing.assert_close(values.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_the_soft_top_k_sum_to_k(monkeypatch, k: int, scale: float, dtype) -> None:
    scores = ragged(dtype=dtype)
    values = scores.values.detach() * scale
    t = soft_top_k.solve(values, scores.valid, k, 2.0)
    totals = (torch.sigmoid(2.0 * (values + t[:, None])) * scores.valid).sum(1)
    # a sum that jumps at a score is reached as nearly as its numbers can be written
    torch.testing.assert_close(
        totals, torch.full_like(totals, k), rtol=0, atol=max(1e-4, 60 * scale * torch.finfo(dtype).eps)
    )
    monkeypatch.setattr(soft_top_k, "CELLS", 1)
    loss = LOSSES.build({"type": "soft_top_k", "k": k})
    again = loss(Scores(values, scores.relevance, scores.valid))
    monkeypatch.undo()
    torch.testing.assert_close(again, loss(Scores(values, scores.relevance, scores.valid)))


def test_a_place_for_every_candidate_leaves_nothing_to_learn() -> None:
    scores = ragged()
    losses = LOSSES.build({"type": "soft_top_k", "k": 11})(scores)
    assert not losses.any()
    assert not torch.autograd.grad(losses.sum(), scores.values)[0].any()


# Teachers -------------------------------------------------------------------------------------------------------------


def test_margin_mse_is_the_mean_over_pairs() -> None:
    scores = ragged()
    known = scores.valid & ~scores.targets.isnan()
    expected = []
    for row in range(len(scores.values)):
        sides = [cells(scores, row, known & side) for side in (scores.positive, scores.negative)]
        s, t = scores.values[row].tolist(), scores.targets[row].tolist()
        expected.append(average([((s[p] - s[n]) - (t[p] - t[n])) ** 2 for p, n in itertools.product(*sides)]))
    assert sum(number > 0 for number in expected) > 3
    assert LOSSES.build("margin_mse")(scores).tolist() == pytest.approx(expected)


def test_dcd_weighs_a_query_by_how_much_harder_it_is_for_the_student() -> None:
    scores = ragged()
    known = scores.valid & ~scores.targets.isnan()
    expected, expected_gradient = [], torch.zeros_like(scores.values)
    for row in range(len(scores.values)):
        columns = cells(scores, row, known)
        positives = [columns.index(p) for p in cells(scores, row, known & scores.positive)]
        if not positives:
            expected.append(0.0)
            continue
        s, t = scores.values[row, columns].detach().requires_grad_(), scores.targets[row, columns]
        student, teacher = (-of.log_softmax(0)[positives].mean() for of in (s, t))
        weight = 1 - math.exp(-student.item() / teacher.item())
        loss = student + 0.5 * weight * (s - t).square().mean()
        expected_gradient[row, columns] = torch.autograd.grad(loss, s)[0]
        expected.append(loss.item())
    losses = LOSSES.build({"type": "dcd", "distillation": 0.5})(scores)
    assert losses.tolist() == pytest.approx(expected)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), scores.values)[0], expected_gradient)


def test_udr_is_its_equation_where_queries_have_different_numbers_of_candidates() -> None:
    scores = ragged()
    known = scores.valid & ~scores.targets.isnan()
    expected = []
    for row in range(len(scores.values)):
        columns = cells(scores, row, known)
        s, t = scores.values[row].tolist(), scores.targets[row].tolist()
        rank = {c: 1 + sum(s[other] > s[c] for other in columns) for c in columns}
        pairs = [
            abs(1 / rank[a] - 1 / rank[b]) * math.log1p(math.exp(s[b] - s[a]))
            for a, b in itertools.permutations(columns, 2)
            if t[a] > t[b]
        ]
        top = max(columns, key=lambda c: t[c])
        total = math.log(sum(math.exp(s[c]) for c in cells(scores, row, scores.valid)))
        expected.append(4 * average(pairs) + total - s[top])
    assert LOSSES.build("udr")(scores).tolist() == pytest.approx(expected)


def test_multicsr_counts_negatives_that_the_guide_did_not_score() -> None:
    values, valid = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    targets = torch.tensor([[0.99, 0.97, NAN, 0.1]])
    loss = LOSSES.build("multicsr")(Scores(values, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), valid, targets))
    assert loss.item() == pytest.approx(math.log(3))


def test_multicsr_without_a_guide_masks_by_the_scores_of_own_documents_alone() -> None:
    """Two documents a query: its own negative, which the data call equal, is out; those of the other query count."""
    labels = dataclasses.replace(make_labels([0, 0, 1, 1], [1, 0, 1, 0]), scores=torch.tensor([1.0, 0.99, 0.98, 0.97]))
    same = Embeddings(torch.ones(2, 4)), Embeddings(torch.ones(4, 4))
    block = {"type": "multicsr", "momentum": None}
    assert build_objective(block)(*same, labels)[0].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("scored", [False, True], ids=["guide", "guide and scores"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("same_tower", [False, True])
def test_the_guide_of_multicsr_judges_all_candidates_of_the_batch(scored, symmetric, same_tower) -> None:
    """By loops: what the guide's cosine, or the data's score, puts above phi is no negative; positives stay."""
    owner, relevant, phi = [0, 0, 1, 1, 2, 2], [1, 0, 1, 0, 1, 0], 0.3
    sides = embed(3, seed=4), embed(6, seed=5)
    guide = embed(3, seed=6), embed(6, seed=7)
    scores = [NAN, 0.9, NAN, 0.1, NAN, NAN] if scored else [NAN] * 6
    labels = dataclasses.replace(make_labels(owner, relevant), scores=torch.tensor(scores), taught=guide)
    (q, d), (gq, gd) = ([torch.nn.functional.normalize(one.vectors, dim=1) for one in pair] for pair in (sides, guide))

    def told(query: int, document: int) -> float:
        given = scores[document] if owner[document] == query else NAN
        return float(gq[query] @ gd[document]) if math.isnan(given) else given

    def row(own: float, others: list[tuple[float, float]]) -> float:
        rest = [math.exp(value) for value, judged in others if judged <= phi]
        return math.log(math.exp(own) + sum(rest)) - own

    forward, reverse = [], []
    for query in range(3):
        positive = 2 * query
        others = [(float(q[query] @ d[j]), told(query, j)) for j in range(6) if j != positive]
        others += [(float(q[query] @ q[j]), float(gq[query] @ gq[j])) for j in range(3) if same_tower and j != query]
        forward.append(row(float(q[query] @ d[positive]), others))
        others = [(float(q[j] @ d[positive]), told(j, positive)) for j in range(3) if j != query]
        others += [
            (float(d[positive] @ d[j]), float(gd[positive] @ gd[j]))
            for j in range(6)
            if same_tower and owner[j] != query
        ]
        reverse.append(row(float(q[query] @ d[positive]), others))
    expected = sum(forward) / 3 if not symmetric else (sum(forward) + sum(reverse)) / 6
    block = {"type": "multicsr", "phi": phi, "temperature": 1.0, "symmetric": symmetric}
    objective = build_objective({**block, "same_tower_negatives": same_tower})
    assert objective.teacher_momentum == 1.0
    assert objective(*sides, labels)[0].item() == pytest.approx(expected, rel=1e-5)
    del block["phi"]
    plain = build_objective({**block, "type": "infonce", "same_tower_negatives": same_tower})
    assert plain(*sides, labels)[0].item() > expected + 1e-3, "some negatives are out"


def test_multicsr_wants_its_guide_and_one_vector_an_input() -> None:
    labels = make_labels([0, 0, 1, 1], [1, 0, 1, 0])
    objective = build_objective("multicsr")
    assert objective.many_vectors is False  # which the preflight holds against the pooling
    with pytest.raises(ConfigError, match="'multicsr' has a guide .*hold no vectors of one"):
        objective(embed(2), embed(4, seed=1), labels)
    several = Embeddings(torch.ones(2, 3, 4), torch.ones(2, 3).bool()), Embeddings(torch.ones(4, 3, 4))
    with pytest.raises(ConfigError, match="'multicsr': its guide compares one vector an input"):
        objective(embed(2), embed(4, seed=1), dataclasses.replace(labels, taught=several))


def test_the_guide_of_multicsr_is_cut_with_the_vectors() -> None:
    guide, labels = (embed(2, seed=2), embed(4, seed=3)), make_labels([0, 0, 1, 1], [1, 0, 1, 0])
    sides, block = (embed(2), embed(4, seed=1)), {"type": "multicsr", "phi": 0.1, "temperature": 1.0}
    whole = build_objective({**block, "matryoshka": {"dims": [2]}})(*sides, dataclasses.replace(labels, taught=guide))
    cut = [[one.truncate(slice(2)) for one in pair] for pair in (sides, guide)]
    torch.testing.assert_close(whole[0], build_objective(block)(*cut[0], dataclasses.replace(labels, taught=cut[1]))[0])


@pytest.mark.parametrize("phi", [1.1, -1.5, 95])
def test_multicsr_takes_a_cosine_for_its_threshold(phi: float) -> None:
    with pytest.raises(ConfigError, match=rf"losses.multicsr.phi: found {phi}; .*equal to"):
        LOSSES.build({"type": "multicsr", "phi": phi})


# Negatives of the same tower ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [True, False])
def test_other_queries_are_negatives_unless_they_ask_the_same(mask: bool) -> None:
    """Queries 0 and 3 have one content, the positive of query 2 is known to answer query 1; one document a query."""
    queries, documents = embed(4), embed(4, seed=1)
    labels = make_labels([0, 1, 2, 3], [1, 1, 1, 1], query_keys=[7, 8, 9, 7], extra=[-1, 102, -2, -3])
    same = {(0, 3), (3, 0), (1, 2)} if mask else set()
    options = {"type": "dcl", "temperature": 0.5, "mask_duplicates": mask, "same_tower_negatives": True}
    loss, metrics = build_objective(options)(queries, documents, labels)
    q, d = (torch.nn.functional.normalize(side.vectors, dim=1) for side in (queries, documents))

    def direction(own: torch.Tensor, others: torch.Tensor, apart) -> float:
        found = []
        for i in range(4):
            negatives = [own[i] @ others[j] for j in range(4) if apart(i, j)]
            negatives += [own[i] @ own[j] for j in range(4) if apart(i, j)]
            found.append(math.log(sum(math.exp(x / 0.5) for x in negatives)) - (own[i] @ others[i]).item() / 0.5)
        return sum(found) / 4

    expected = direction(q, d, lambda i, j: i != j and (i, j) not in same)
    assert loss.item() == pytest.approx(expected)
    symmetric, _ = build_objective({**options, "symmetric": True})(queries, documents, labels)
    if not mask:
        assert symmetric.item() == pytest.approx((expected + direction(d, q, lambda i, j: i != j)) / 2)
    assert symmetric.item() != pytest.approx(expected)
    assert metrics["accuracy"] <= 1


def test_other_queries_are_no_negatives_where_a_source_has_none_in_the_batch() -> None:
    queries, documents = embed(3), embed(6, seed=1)
    labels = make_labels([0, 0, 1, 1, 2, 2], [1, 0, 1, 0, 1, 0], in_batch=False)
    losses = [
        build_objective({"type": "dcl", "same_tower_negatives": same})(queries, documents, labels)[0]
        for same in (True, False)
    ]
    torch.testing.assert_close(*losses)


# Sources that do not suit ---------------------------------------------------------------------------------------------


def source_check(folder: Path, objective: object, document_numbers: list[dict[str, float]]) -> None:
    folder.mkdir()
    file = folder / "some.jsonl"
    documents = [{"content": f"document {place}", **numbers} for place, numbers in enumerate(document_numbers)]
    file.write_text(json.dumps({"query": "q", "documents": documents}) + "\n", encoding="utf-8")
    config = build_config({"data": {"train": [{"path": str(file), "name": "some"}]}, "objective": objective})
    build_objective(config.objective).check([RecordDataset(config.data.train[0], cache_dir=folder / "cache")])


BINARY = [{"relevance": 1}, {"relevance": 0}]
TAUGHT = [{"relevance": 1, "score": 0.9}, {"relevance": 0, "score": 0.1}]
GRADED = [{"relevance": 2}, {"relevance": 1}, {"relevance": 0}]


@pytest.mark.parametrize("name", ["wasserstein", "kl_divergence", "listnet"])
def test_graded_losses_refuse_binary_sources(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'some' tells relevant from not, no degrees; objective '{name}'"):
        source_check(tmp_path / "binary", name, BINARY)
    source_check(tmp_path / "graded", name, GRADED)


@pytest.mark.parametrize("name", ["distil_kl", "margin_mse", "dse", "dcd", "udr", "multicsr"])
def test_distillation_refuses_sources_without_a_teacher(tmp_path: Path, name: str) -> None:
    block = {"type": name, **({"momentum": None} if name == "multicsr" else {})}
    with pytest.raises(ConfigError, match=f"'some' carries no 'score'; objective '{name}'"):
        source_check(tmp_path / "binary", block, BINARY)
    source_check(tmp_path / "taught", [block, "infonce"], TAUGHT)
    if name == "multicsr":
        source_check(tmp_path / "guided", name, BINARY)


def test_a_teacher_that_always_says_the_same_is_refused() -> None:
    labels = make_labels([0, 0, 1, 1, 2, 2, 3, 3], [1, 0] * 4)
    objective = build_objective("margin_mse")
    for scores, refused in ((torch.full((8,), 0.5), True), (torch.tensor([0.5] * 7 + [0.4]), False)):
        given = dataclasses.replace(labels, scores=scores, source="some")
        if refused:
            with pytest.raises(ConfigError, match="'some': all 8 scores of a batch are 0.5; objective 'margin_mse'"):
                objective.gather(embed(4), embed(8, seed=1), given)
        else:
            objective.gather(embed(4), embed(8, seed=1), given)
