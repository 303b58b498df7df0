"""Losses, objectives and the Lion step against values computed outside this repository (losses.json)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.losses import LOSSES, Scores
from mmembed.losses.rank_kl import ranks
from mmembed.objectives import build_objective
from mmembed.training.optimizers import Lion

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())
TOLERANCE = 1e-6


def tensor(values, grad=True):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def labels_of(queries, documents, group_size=1, in_batch=True):
    """Group-major: document j belongs to query j // group_size and the first of a group is the positive."""
    position = torch.arange(documents)
    return BatchLabels(
        owner=position // group_size,
        relevance=(position % group_size == 0).double(),
        document_keys=torch.stack([position + 1000, position + 1000], dim=1),
        query_keys=torch.arange(queries),
        positive_keys=(torch.arange(queries) * group_size + 1000)[:, None, None].expand(-1, -1, 2),
        in_batch=in_batch,
    )


@pytest.mark.parametrize(
    "entry", GOLDEN["infonce"] + GOLDEN["nv-embed"] + GOLDEN["saha"], ids=lambda entry: entry["name"]
)
def test_contrastive(entry):
    queries, documents = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["p"])
    parameters = entry["params"]
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": parameters["temperature"],
            # sentence-transformers, the reference of the symmetric entry, differentiates through the normalisation
            "similarity": "cosine" if parameters.get("symmetric") else "dot",
            "symmetric": parameters.get("symmetric", False),
        }
    )
    labels = labels_of(
        len(queries),
        len(documents),
        entry["inputs"].get("group_size", 1),
        parameters.get("in_batch_negatives", True),
    )
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels)
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert queries.grad.norm().item() == pytest.approx(entry["grad_norms"]["q"], abs=TOLERANCE)
    if "p" in entry["grad_norms"]:
        assert documents.grad.norm().item() == pytest.approx(entry["grad_norms"]["p"], abs=TOLERANCE)


def test_several_positives_among_all_candidates_is_supcon():
    entry = next(one for one in GOLDEN["supcon"] if one["params"]["temperature"] == one["params"]["base_temperature"])
    features = tensor(entry["inputs"]["features"])  # (samples, views, E)
    views = features.flatten(0, 1)  # (6, E)
    label = torch.tensor(entry["inputs"]["labels"]).repeat_interleave(features.shape[1])
    other = ~torch.eye(len(views), dtype=torch.bool)
    relevance = ((label[:, None] == label[None, :]) & other).double()
    scores = Scores(views @ views.T / entry["params"]["temperature"], relevance, other)
    loss = LOSSES.build({"type": "infonce", "negatives": "all"})(scores).mean()
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert features.grad.norm().item() == pytest.approx(entry["grad_norms"]["features"], abs=TOLERANCE)


def test_matryoshka():
    (entry,) = GOLDEN["matryoshka"]
    queries, documents = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["p"])
    parameters = entry["params"]
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": parameters["temperature"],
            "matryoshka": {"dims": parameters["dims"], "weights": parameters["weights"]},
        }
    )
    loss, metrics = objective(Embeddings(queries), Embeddings(documents), labels_of(len(queries), len(documents)))
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    for size, expected in entry["expected"]["per_dim"].items():
        assert metrics[f"loss_{size}"].item() == pytest.approx(expected, abs=TOLERANCE)
    assert queries.grad.norm().item() == pytest.approx(entry["grad_norms"]["q"], abs=TOLERANCE)
    assert documents.grad.norm().item() == pytest.approx(entry["grad_norms"]["p"], abs=TOLERANCE)


def test_late_interaction_colbert():
    (entry,) = GOLDEN["colbert-maxsim"]
    inputs = entry["inputs"]
    queries, documents = tensor(inputs["query_tokens"]), tensor(inputs["doc_tokens"])
    objective = build_objective({"type": "contrastive", "temperature": 1.0, "similarity": "maxsim"})
    loss, _ = objective(
        Embeddings(queries, torch.tensor(inputs["query_mask"]).bool()),
        Embeddings(documents, torch.ones(documents.shape[:2], dtype=torch.bool)),
        labels_of(len(queries), len(documents)),
    )
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert queries.grad.norm().item() == pytest.approx(entry["grad_norms"]["query_tokens"], abs=TOLERANCE)
    assert documents.grad.norm().item() == pytest.approx(entry["grad_norms"]["doc_tokens"], abs=TOLERANCE)


def test_late_interaction_filip_has_a_matrix_a_direction():
    (entry,) = GOLDEN["filip"]
    inputs = entry["inputs"]
    text, image = tensor(inputs["text_tokens"]), tensor(inputs["image_tokens"])
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": entry["params"]["temperature"],
            "similarity": "maxsim_mean",
            "symmetric": True,
        }
    )
    loss, _ = objective(
        Embeddings(text, torch.tensor(inputs["text_mask"]).bool()),
        Embeddings(image, torch.ones(image.shape[:2], dtype=torch.bool)),
        labels_of(len(text), len(image)),
    )
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert text.grad.norm().item() == pytest.approx(entry["grad_norms"]["text_tokens"], abs=TOLERANCE)
    assert image.grad.norm().item() == pytest.approx(entry["grad_norms"]["image_tokens"], abs=TOLERANCE)


def test_lion_step():
    (entry,) = GOLDEN["lion"]
    parameters = entry["params"]
    parameter = torch.nn.Parameter(tensor(entry["inputs"]["p"], grad=False))
    optimizer = Lion(
        [parameter],
        lr=parameters["lr"],
        betas=(parameters["beta1"], parameters["beta2"]),
        weight_decay=parameters["weight_decay"],
    )
    optimizer.state[parameter]["momentum"] = tensor(entry["inputs"]["exp_avg"], grad=False)
    parameter.grad = tensor(entry["inputs"]["grad"], grad=False)
    optimizer.step()
    assert parameter.tolist() == pytest.approx(entry["expected"]["p"], abs=1e-12)
    assert optimizer.state[parameter]["momentum"].tolist() == pytest.approx(entry["expected"]["exp_avg"], abs=1e-12)


def entry_of(slug, name):
    (entry,) = (entry for entry in GOLDEN[slug] if entry["name"].startswith(name))
    return entry


def pairs_of(values, gold):
    """N graded pairs as `pairs` hands them to a loss: one row."""
    return Scores(values[None], gold[None], torch.ones(1, len(values), dtype=torch.bool))


STS = {"Pearson": "pearson", "rank-KL": "rank_kl", "PRO": "pro"}


@pytest.mark.parametrize("name", STS)
def test_graded_pairs(name):
    entry = entry_of("codiemb", name)
    predicted, gold = tensor(entry["inputs"]["pred"]), tensor(entry["inputs"]["gold"], grad=False)
    temperature = entry["params"].get("temperature", 1.0)  # a correlation has none
    loss = LOSSES.build(STS[name])(pairs_of(predicted / temperature, gold)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert predicted.grad.norm().item() == pytest.approx(entry["grad_norms"]["pred"], abs=TOLERANCE)
    if name == "rank-KL":
        whole = LOSSES.build({"type": "rank_kl", "reduction": "sum"})(pairs_of(predicted / temperature, gold))
        assert whole.item() == pytest.approx(entry["expected"]["sum_value"], abs=TOLERANCE)
        found = ranks(pairs_of(predicted, gold))[0]
        assert found.tolist() == entry["expected"]["avg_rank"]


def test_the_sum_of_graded_pairs_through_its_yaml():
    """Unit vectors in the plane, whose cosine with the query (1, 0) is the golden prediction."""
    entry = entry_of("codiemb", "STS total")
    predicted = tensor(entry["inputs"]["pred"])
    weights = entry["params"]
    objective = build_objective(
        [
            {"type": "pearson", "weight": weights["w_pearson"]},
            {"type": "pro", "weight": weights["w_pro"]},
            {"type": "rank_kl", "weight": weights["w_kl"]},
        ]
    )
    count = len(predicted)
    documents = torch.stack([predicted, (1 - predicted.square()).sqrt()], dim=1)  # (N, 2)
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(count, -1)
    labels = replace(labels_of(count, count), relevance=tensor(entry["inputs"]["gold"], grad=False))
    loss, metrics = objective(Embeddings(queries), Embeddings(documents), labels)
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert predicted.grad.norm().item() == pytest.approx(entry["grad_norms"]["pred"], abs=TOLERANCE)
    assert metrics["loss_pearson"].item() == pytest.approx(entry_of("codiemb", "Pearson")["loss"], abs=TOLERANCE)


def test_graded_pairs_above_a_threshold_are_anchors():
    entry = entry_of("codiemb", "STS thresholded")
    queries, documents = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["p"])
    objective = build_objective({"type": "thresholded_infonce", **entry["params"], "similarity": "dot"})
    labels = replace(
        labels_of(len(queries), len(documents)), relevance=tensor(entry["inputs"]["gold"], grad=False), in_batch=False
    )
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels)
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert queries.grad.norm().item() == pytest.approx(entry["grad_norms"]["q"], abs=TOLERANCE)
    assert documents.grad.norm().item() == pytest.approx(entry["grad_norms"]["p"], abs=TOLERANCE)


def test_mid_nce_is_that_of_a_lower_layer():
    entry = entry_of("codiemb", "STS thresholded")
    sides = [tensor(entry["inputs"][key]) for key in ("q", "p")]
    embeddings = [Embeddings(torch.eye(3).double(), None, {2: side}) for side in sides]
    mid_nce = {"type": "thresholded_infonce", **entry["params"], "similarity": "dot", "layer": "middle"}
    labels = replace(labels_of(3, 3), relevance=tensor(entry["inputs"]["gold"], grad=False), in_batch=False)
    loss, metrics = build_objective(["pearson", mid_nce], depth=4)(*embeddings, labels)
    loss.backward()
    assert metrics["loss_thresholded_infonce"].item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert sides[0].grad.norm().item() == pytest.approx(entry["grad_norms"]["q"], abs=TOLERANCE)
    assert sides[1].grad.norm().item() == pytest.approx(entry["grad_norms"]["p"], abs=TOLERANCE)


def test_one_positive_at_a_time():
    entry = entry_of("codiemb", "IR multi-positive")
    queries, documents, parameters = tensor(entry["inputs"]["q"]), tensor(entry["inputs"]["p"]), entry["params"]
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": parameters["temperature"],
            "similarity": "dot",
            "positives": "one_at_a_time",
        }
    )
    positives, negatives = parameters["positives_per_query"], parameters["negatives_per_query"]
    labels = labels_of(len(queries), len(documents), positives + negatives)
    relevance = (torch.arange(len(documents)) % (positives + negatives) < positives).double()
    loss, _ = objective(Embeddings(queries), Embeddings(documents), replace(labels, relevance=relevance))
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], abs=TOLERANCE)
    assert queries.grad.norm().item() == pytest.approx(entry["grad_norms"]["q"], abs=TOLERANCE)
    assert documents.grad.norm().item() == pytest.approx(entry["grad_norms"]["p"], abs=TOLERANCE)
