"""Cases of the losses over scores, and of the objectives that are made of one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmembed.embeddings import Embeddings
from mmembed.losses import LOSSES, Scores
from mmembed.losses.soft_top_k import solve
from mmembed.objectives import build_objective
from tests.golden.case import Compared, Entry, check, equal, golden, inputs, labels_of, tensor


def everywhere(values: torch.Tensor) -> torch.Tensor:
    return torch.ones(values.shape, dtype=torch.bool)


# SyCL -----------------------------------------------------------------------------------------------------------------

SYCL = {"W2": "wasserstein", "KL": "kl_divergence", "ListNet": "listnet", "InfoNCE": "infonce"}


def name_of(entry: Entry) -> str:
    return SYCL[entry["name"].split()[0]]


@golden("sycl", lambda entry: f"loss `{name_of(entry)}`")
def sycl(entry: Entry) -> Iterator[Compared]:
    (logits,) = inputs(entry, "logits")  # (B, C)
    grades = tensor(entry["inputs"].get("labels", [[1, 0, 0, 0]] * 2), grad=False)  # (B, K)
    if logits.shape[1] != grades.shape[1]:
        grades = torch.block_diag(*grades)  # candidates of other queries have grade 0
    loss = LOSSES.build(name_of(entry))(Scores(logits, grades, everywhere(logits))).mean()
    yield from check(entry, loss, logits=logits)
    expected = entry.get("expected", {})
    if "extended_labels" in expected:
        yield equal("grades", grades, expected["extended_labels"])
    if expected:
        yield equal("closed form", loss, expected["closed_form"], 1e-9)  # the reference has a jitter


# Mann-Whitney ---------------------------------------------------------------------------------------------------------


@golden("mw-loss", "objective `mann_whitney`")
def mann_whitney(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
    labels = labels_of(len(queries), len(documents), entry["inputs"]["group_size"])

    def loss(reduction: str) -> torch.Tensor:
        options = {"reduction": reduction, "similarity": "dot", "temperature": entry["params"]["temperature"]}
        objective = build_objective({"type": "mann_whitney", **options})
        return objective(Embeddings(queries), Embeddings(documents), labels)[0]

    yield from check(entry, loss("sum"), q=queries, p=documents)
    yield equal("mean", loss("mean"), entry["expected"]["mean_reduction"])


# Decoupled contrastive learning ---------------------------------------------------------------------------------------


def dcl_of(entry: Entry) -> str:
    return "dclw" if "sigma" in entry["params"] else "dcl"


@golden("dcl", lambda entry: f"objective `{dcl_of(entry)}`")
def dcl(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "z1", "z2")
    objective = build_objective(
        {
            "type": dcl_of(entry),
            "temperature": entry["params"]["temperature"],
            "similarity": "dot",
            "same_tower_negatives": entry["params"].get("same_view_negatives", True),
            **{key: value for key, value in entry["params"].items() if key == "sigma"},
        }
    )
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels_of(len(queries), len(documents)))
    yield from check(entry, loss, z1=queries, z2=documents)


# DEXML ----------------------------------------------------------------------------------------------------------------


def dexml(entry: Entry) -> tuple[torch.Tensor, Scores]:
    (similarities,) = inputs(entry, "sim")
    relevance = torch.zeros_like(similarities)
    for row, positives in enumerate(entry["inputs"]["positives"]):
        relevance[row, positives] = 1
    return similarities, Scores(similarities, relevance, everywhere(similarities))


@golden("dexml", "loss `decoupled_softmax`", "decoupled")
def decoupled_softmax(entry: Entry) -> Iterator[Compared]:
    similarities, scores = dexml(entry)
    yield from check(entry, LOSSES.build("decoupled_softmax")(scores).mean(), sim=similarities)


@golden("dexml", "loss `infonce` times the number of positives", "multi-label")
def multi_label_softmax(entry: Entry) -> Iterator[Compared]:
    similarities, scores = dexml(entry)
    rows = LOSSES.build({"type": "infonce", "negatives": "all"})(scores) * scores.positive.sum(1)
    yield from check(entry, rows.mean(), sim=similarities)


@golden("dexml", "loss `soft_top_k`", "soft top-k")
def soft_top_k(entry: Entry) -> Iterator[Compared]:
    similarities, scores = dexml(entry)
    options = {"k": entry["params"]["k"], "alpha": entry["params"]["alpha"]}
    yield from check(entry, LOSSES.build({"type": "soft_top_k", **options})(scores).mean(), sim=similarities)
    yield equal("t", solve(similarities.detach(), scores.valid, **options), entry["expected"]["t"])


# Teachers -------------------------------------------------------------------------------------------------------------


@golden("distil-kl", "loss `distil_kl`")
def distil_kl(entry: Entry) -> Iterator[Compared]:
    (student,) = inputs(entry, "student_scores")
    temperature = entry["params"]["student_temperature"]
    targets = tensor(entry["inputs"]["teacher_scores"], grad=False)
    loss = LOSSES.build({"type": "distil_kl", "teacher_temperature": entry["params"]["teacher_temperature"]})
    scores = Scores(student / temperature, torch.zeros_like(student), everywhere(student), targets, temperature)
    yield from check(entry, loss(scores).mean(), student_scores=student)


@golden("distil-margin-mse", "loss `margin_mse`")
def margin_mse(entry: Entry) -> Iterator[Compared]:
    of = entry["inputs"]
    positive, negative = inputs(entry, "student_pos", "student_neg")
    values = torch.stack([positive, negative], 1)  # (2, 2)
    targets = torch.stack([tensor(of[key], grad=False) for key in ("teacher_pos", "teacher_neg")], 1)
    scores = Scores(values, torch.tensor([[1.0, 0.0]] * 2), everywhere(values), targets)
    yield from check(entry, LOSSES.build("margin_mse")(scores).mean(), student_pos=positive, student_neg=negative)


@golden("dse", "loss `dse`")
def dse(entry: Entry) -> Iterator[Compared]:
    (logits,) = inputs(entry, "student_logits")  # (3, 1)
    targets, labels = (tensor(entry["inputs"][key], grad=False) for key in ("teacher_logits", "labels"))
    loss = LOSSES.build({"type": "dse", "distillation": entry["params"]["distillation_coeff"]})
    yield from check(entry, loss(Scores(logits, labels, everywhere(logits), targets)).mean(), student_logits=logits)


@golden("udr", "loss `udr`")
def udr(entry: Entry) -> Iterator[Compared]:
    queries, candidates = inputs(entry, "q", "candidates")
    values = queries @ candidates.T  # (2, 6)
    many = entry["params"]["candidates_per_query"]
    targets = torch.full_like(values.detach(), float("nan"))
    for row in range(len(queries)):
        targets[row, row * many : (row + 1) * many] = torch.arange(many, 0, -1).double()
    scores = Scores(values, (targets == many).double(), everywhere(values), targets)

    def loss(list_weight: float) -> torch.Tensor:
        return LOSSES.build({"type": "udr", "list_weight": list_weight})(scores).mean()

    yield equal("in batch", loss(0.0), entry["expected"]["in_batch"])
    yield equal("of the list", loss(1.0) - loss(0.0), entry["expected"]["list_loss"])
    yield from check(entry, loss(float(entry["params"]["rank_loss_factor"])), q=queries, candidates=candidates)


@golden("multicsr", "loss `multicsr`", "stage-3 with -inf masking")
def multicsr(entry: Entry) -> Iterator[Compared]:
    """The loss alone: the guide scores every cell here, in a run the query's own documents (`Relations.targets`)."""
    z, positives, negatives = inputs(entry, "z", "z_pos", "z_neg")
    guide, guide_positives, guide_negatives = (
        tensor(entry["inputs"][key], grad=False) for key in ("guide", "guide_pos", "guide_neg")
    )
    values = z @ torch.cat([positives, negatives]).T / entry["params"]["temperature"]  # (3, 6)
    others = torch.nn.functional.normalize(torch.cat([guide_positives, guide_negatives]), dim=1)
    targets = torch.nn.functional.normalize(guide, dim=1) @ others.T
    scores = Scores(values, torch.eye(3, 6).double(), everywhere(values), targets)
    loss = LOSSES.build({"type": "multicsr", "phi": entry["params"]["phi"]})(scores).mean()
    yield from check(entry, loss, z=z)
