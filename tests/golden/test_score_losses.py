"""Losses over scores against values computed outside this repository (losses.json), with their gradients."""

import pytest
import torch

from mmembed.embeddings import Embeddings
from mmembed.losses import LOSSES, Scores
from mmembed.objectives import build_objective
from tests.golden.test_losses import GOLDEN, TOLERANCE, labels_of, tensor


def entries(slug, *words):
    found = [entry for entry in GOLDEN[slug] if any(word in entry["name"] for word in words)] if words else GOLDEN[slug]
    assert found
    return pytest.mark.parametrize("entry", found, ids=lambda entry: entry["name"])


def everywhere(values):
    return torch.ones(values.shape, dtype=torch.bool)


def check(loss, entry, **leaves):
    """The mean loss and the norm of its gradient at each leaf, where the reference gives one."""
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    loss.backward()
    for name, expected in entry.get("grad_norms", {}).items():
        assert leaves[name].grad.norm().item() == pytest.approx(expected, abs=TOLERANCE), name


# SyCL -----------------------------------------------------------------------------------------------------------------

SYCL = {"W2": "wasserstein", "KL": "kl_divergence", "ListNet": "listnet", "InfoNCE": "infonce"}


@entries("sycl")
def test_sycl(entry):
    logits = tensor(entry["inputs"]["logits"])  # (B, C)
    grades = tensor(entry["inputs"].get("labels", [[1, 0, 0, 0]] * 2), grad=False)  # (B, K)
    if logits.shape[1] != grades.shape[1]:
        grades = torch.block_diag(*grades)  # candidates of other queries have grade 0
    if "expected" in entry and "extended_labels" in entry["expected"]:
        assert grades.tolist() == entry["expected"]["extended_labels"]
    name = SYCL[entry["name"].split()[0]]
    loss = LOSSES.build(name)(Scores(logits, grades, everywhere(logits))).mean()
    check(loss, entry, logits=logits)
    if "expected" in entry:
        assert loss.item() == pytest.approx(entry["expected"]["closed_form"], abs=1e-9)  # the reference has a jitter


# Mann-Whitney ---------------------------------------------------------------------------------------------------------


@entries("mw-loss")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mann_whitney(entry, reduction):
    queries, documents = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["p"])
    objective = build_objective(
        {
            "type": "mann_whitney",
            "reduction": reduction,
            "similarity": "dot",
            "temperature": entry["params"]["temperature"],
        }
    )
    labels = labels_of(len(queries), len(documents), entry["inputs"]["group_size"])
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels)
    if reduction == "mean":
        assert loss.item() == pytest.approx(entry["expected"]["mean_reduction"], abs=TOLERANCE)
    else:
        check(loss, entry, q=queries, p=documents)


# Decoupled contrastive learning ---------------------------------------------------------------------------------------


@entries("dcl")
def test_dcl(entry):
    queries, documents = tensor(entry["inputs"]["z1"]), tensor(entry["inputs"]["z2"])
    objective = build_objective(
        {
            "type": "dclw" if "sigma" in entry["params"] else "dcl",
            "temperature": entry["params"]["temperature"],
            "similarity": "dot",
            "same_tower_negatives": entry["params"].get("same_view_negatives", True),
            **{key: value for key, value in entry["params"].items() if key == "sigma"},
        }
    )
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels_of(len(queries), len(documents)))
    check(loss, entry, z1=queries, z2=documents)


# DEXML ----------------------------------------------------------------------------------------------------------------


def dexml(entry):
    similarities = tensor(entry["inputs"]["sim"])
    relevance = torch.zeros_like(similarities)
    for row, positives in enumerate(entry["inputs"]["positives"]):
        relevance[row, positives] = 1
    return similarities, Scores(similarities, relevance, everywhere(similarities))


@entries("dexml", "decoupled")
def test_decoupled_softmax(entry):
    similarities, scores = dexml(entry)
    check(LOSSES.build("decoupled_softmax")(scores).mean(), entry, sim=similarities)


@entries("dexml", "baseline")
def test_multi_label_softmax_is_infonce_times_the_number_of_positives(entry):
    similarities, scores = dexml(entry)
    rows = LOSSES.build({"type": "infonce", "negatives": "all"})(scores) * scores.positive.sum(1)
    check(rows.mean(), entry, sim=similarities)


@entries("dexml", "top-k")
def test_soft_top_k(entry):
    from mmembed.losses.soft_top_k import solve

    similarities, scores = dexml(entry)
    options = {"k": entry["params"]["k"], "alpha": entry["params"]["alpha"]}
    check(LOSSES.build({"type": "soft_top_k", **options})(scores).mean(), entry, sim=similarities)
    assert solve(similarities.detach(), scores.valid, **options).tolist() == pytest.approx(entry["expected"]["t"])


# Teachers -------------------------------------------------------------------------------------------------------------


@entries("distil-kl")
def test_distil_kl(entry):
    student = tensor(entry["inputs"]["student_scores"])
    temperature = entry["params"]["student_temperature"]
    targets = tensor(entry["inputs"]["teacher_scores"], grad=False)
    loss = LOSSES.build({"type": "distil_kl", "teacher_temperature": entry["params"]["teacher_temperature"]})
    scores = Scores(student / temperature, torch.zeros_like(student), everywhere(student), targets, temperature)
    check(loss(scores).mean(), entry, student_scores=student)


@entries("distil-margin-mse")
def test_margin_mse(entry):
    inputs = entry["inputs"]
    positive = tensor(inputs["student_pos"])
    values = torch.stack([positive, tensor(inputs["student_neg"], grad=False)], 1)  # (2, 2)
    targets = torch.stack([tensor(inputs[key], grad=False) for key in ("teacher_pos", "teacher_neg")], 1)
    scores = Scores(values, torch.tensor([[1.0, 0.0]] * 2), everywhere(values), targets)
    check(LOSSES.build("margin_mse")(scores).mean(), entry, student_pos=positive)


@entries("dse")
def test_dse(entry):
    logits = tensor(entry["inputs"]["student_logits"])  # (3, 1)
    targets, labels = (tensor(entry["inputs"][key], grad=False) for key in ("teacher_logits", "labels"))
    loss = LOSSES.build({"type": "dse", "distillation": entry["params"]["distillation_coeff"]})
    check(loss(Scores(logits, labels, everywhere(logits), targets)).mean(), entry, student_logits=logits)


@entries("udr")
def test_udr(entry):
    queries, candidates = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["candidates"])
    values = queries @ candidates.T  # (2, 6)
    many = entry["params"]["candidates_per_query"]
    targets = torch.full_like(values.detach(), float("nan"))
    for row in range(len(queries)):
        targets[row, row * many : (row + 1) * many] = torch.arange(many, 0, -1).double()
    scores = Scores(values, (targets == many).double(), everywhere(values), targets)
    parts = [LOSSES.build({"type": "udr", "list_weight": weight})(scores).mean().item() for weight in (0.0, 1.0)]
    assert parts[0] == pytest.approx(entry["expected"]["in_batch"], abs=TOLERANCE)
    assert parts[1] - parts[0] == pytest.approx(entry["expected"]["list_loss"], abs=TOLERANCE)
    loss = LOSSES.build({"type": "udr", "list_weight": float(entry["params"]["rank_loss_factor"])})(scores).mean()
    check(loss, entry, q=queries, candidates=candidates)


@entries("multicsr", "-inf")
def test_multicsr(entry):
    """The released form is not ours: it turns a masked logit into exp(0) and averages over all cells."""
    inputs = entry["inputs"]
    z, positives, negatives = (tensor(inputs[key]) for key in ("z", "z_pos", "z_neg"))
    guide, guide_positives, guide_negatives = (
        tensor(inputs[key], grad=False) for key in ("guide", "guide_pos", "guide_neg")
    )
    values = z @ torch.cat([positives, negatives]).T / entry["params"]["temperature"]  # (3, 6)
    others = torch.nn.functional.normalize(torch.cat([guide_positives, guide_negatives]), dim=1)
    targets = torch.nn.functional.normalize(guide, dim=1) @ others.T
    scores = Scores(values, torch.eye(3, 6).double(), everywhere(values), targets)
    loss = LOSSES.build({"type": "multicsr", "phi": entry["params"]["phi"]})(scores).mean()
    check(loss, entry, z=z)
