"""Cases of the objectives over queries and documents: contrastive in its forms, late interaction, graded pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mmembed.backbones.output_embedding import OutputEmbedding
from mmembed.embeddings import Embeddings
from mmembed.losses import LOSSES, Scores
from mmembed.losses.rank_kl import ranks
from mmembed.objectives import build_objective
from tests.golden.case import GRADIENT, LOSS, Compared, Entry, check, entry_of, equal, golden, inputs, labels_of, tensor


@golden("infonce", "objective `contrastive`")
@golden("nv-embed", "objective `contrastive`", "stage")
@golden("saha", "objective `contrastive`", "cluster-batch")
def contrastive(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
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
    yield from check(entry, loss, q=queries, p=documents)


@golden("supcon", "loss `infonce`, negatives: all", "SupCon (2 views)")
def several_positives_among_all_candidates(entry: Entry) -> Iterator[Compared]:
    (features,) = inputs(entry, "features")  # (samples, views, E)
    views = features.flatten(0, 1)  # (6, E)
    label = torch.tensor(entry["inputs"]["labels"]).repeat_interleave(features.shape[1])
    other = ~torch.eye(len(views), dtype=torch.bool)
    relevance = ((label[:, None] == label[None, :]) & other).double()
    scores = Scores(views @ views.T / entry["params"]["temperature"], relevance, other)
    loss = LOSSES.build({"type": "infonce", "negatives": "all"})(scores).mean()
    yield from check(entry, loss, features=features)


@golden("matryoshka", "objective `contrastive`, matryoshka")
def matryoshka(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
    parameters = entry["params"]
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": parameters["temperature"],
            "matryoshka": {"dims": parameters["dims"], "weights": parameters["weights"]},
        }
    )
    loss, metrics = objective(Embeddings(queries), Embeddings(documents), labels_of(len(queries), len(documents)))
    yield from check(entry, loss, q=queries, p=documents)
    for size, expected in entry["expected"]["per_dim"].items():
        yield equal(f"loss of {size} dimensions", metrics[f"loss_{size}"], expected)


@golden("colbert-maxsim", "objective `contrastive`, similarity: maxsim")
def late_interaction_colbert(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "query_tokens", "doc_tokens")
    objective = build_objective({"type": "contrastive", "temperature": 1.0, "similarity": "maxsim"})
    loss, _ = objective(
        Embeddings(queries, torch.tensor(entry["inputs"]["query_mask"]).bool()),
        Embeddings(documents, torch.ones(documents.shape[:2], dtype=torch.bool)),
        labels_of(len(queries), len(documents)),
    )
    yield from check(entry, loss, query_tokens=queries, doc_tokens=documents)


@golden("filip", "objective `contrastive`, similarity: maxsim_mean")
def late_interaction_filip_has_a_matrix_a_direction(entry: Entry) -> Iterator[Compared]:
    text, image = inputs(entry, "text_tokens", "image_tokens")
    objective = build_objective(
        {
            "type": "contrastive",
            "temperature": entry["params"]["temperature"],
            "similarity": "maxsim_mean",
            "symmetric": True,
        }
    )
    loss, _ = objective(
        Embeddings(text, torch.tensor(entry["inputs"]["text_mask"]).bool()),
        Embeddings(image, torch.ones(image.shape[:2], dtype=torch.bool)),
        labels_of(len(text), len(image)),
    )
    yield from check(entry, loss, text_tokens=text, image_tokens=image)


# Graded pairs ---------------------------------------------------------------------------------------------------------

STS = {"Pearson": "pearson", "rank-KL": "rank_kl", "PRO": "pro"}


def name_of(entry: Entry) -> str:
    return STS[entry["name"].split()[0]]


def pairs_of(values: torch.Tensor, gold: torch.Tensor) -> Scores:
    """N graded pairs as `pairs` hands them to a loss: one row."""
    return Scores(values[None], gold[None], torch.ones(1, len(values), dtype=torch.bool))


@golden("codiemb", lambda entry: f"loss `{name_of(entry)}`", *STS)
def graded_pairs(entry: Entry) -> Iterator[Compared]:
    predicted, gold = tensor(entry["inputs"]["pred"]), tensor(entry["inputs"]["gold"], grad=False)
    temperature, name = entry["params"].get("temperature", 1.0), name_of(entry)  # a correlation has none
    yield from check(entry, LOSSES.build(name)(pairs_of(predicted / temperature, gold)).sum(), pred=predicted)
    if name == "rank_kl":
        whole = LOSSES.build({"type": "rank_kl", "reduction": "sum"})(pairs_of(predicted / temperature, gold))
        yield equal("sum", whole.sum(), entry["expected"]["sum_value"])
        yield equal("ranks", ranks(pairs_of(predicted, gold)), entry["expected"]["avg_rank"])


@golden("codiemb", "objectives `pearson`, `pro`, `rank_kl`", "STS total")
def the_sum_of_graded_pairs_through_its_yaml(entry: Entry) -> Iterator[Compared]:
    """Unit vectors in the plane, whose cosine with the query (1, 0) is the golden prediction."""
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
    yield from check(entry, loss, pred=predicted)
    yield equal("loss_pearson", metrics["loss_pearson"], entry_of("codiemb", "Pearson")["loss"])


@golden("codiemb", "objective `thresholded_infonce`", "STS thresholded")
def graded_pairs_above_a_threshold_are_anchors(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
    objective = build_objective({"type": "thresholded_infonce", **entry["params"], "similarity": "dot"})
    labels = replace(
        labels_of(len(queries), len(documents)), relevance=tensor(entry["inputs"]["gold"], grad=False), in_batch=False
    )
    loss, _ = objective(Embeddings(queries), Embeddings(documents), labels)
    yield from check(entry, loss, q=queries, p=documents)


@golden("codiemb", "objective `thresholded_infonce`, layer: middle", "STS thresholded")
def the_same_of_a_lower_layer(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
    embeddings = [Embeddings(torch.eye(3).double(), None, {2: side}) for side in (queries, documents)]
    mid_nce = {"type": "thresholded_infonce", **entry["params"], "similarity": "dot", "layer": "middle"}
    labels = replace(labels_of(3, 3), relevance=tensor(entry["inputs"]["gold"], grad=False), in_batch=False)
    loss, metrics = build_objective(["pearson", mid_nce], depth=4)(*embeddings, labels)
    loss.backward()  # Pearson's gradient stays in the upper layer
    yield equal(LOSS, metrics["loss_thresholded_infonce"], entry["loss"])
    for name, leaf in (("q", queries), ("p", documents)):
        yield equal(GRADIENT + name, leaf.grad.norm(), entry["grad_norms"][name])


@golden("codiemb", "objective `contrastive`, positives: one_at_a_time", "IR multi-positive")
def one_positive_at_a_time(entry: Entry) -> Iterator[Compared]:
    queries, documents = inputs(entry, "q", "p")
    parameters = entry["params"]
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
    yield from check(entry, loss, q=queries, p=documents)


@golden("coca", "objective `contrastive` + `captioning`")
def coca(entry: Entry) -> Iterator[Compared]:
    """Caption logits become hidden states in front of their labels, read out by the identity."""
    (logits,) = inputs(entry, "caption_logits")  # (B, T, V)
    parameters, labels = entry["params"], torch.tensor(entry["inputs"]["caption_labels"])  # (B, T)
    ids = torch.cat([torch.zeros_like(labels[:, :1]), labels], 1)
    hidden = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
    read = OutputEmbedding(torch.eye(logits.shape[2], dtype=torch.float64))
    nll, predicted = read(hidden, ids, ids != parameters["pad_id"], torch.nn.Identity())
    images, texts = (tensor(entry["inputs"][side], grad=False) for side in ("image", "text"))
    blank = torch.zeros(len(texts) - len(labels), dtype=torch.long)  # captions of two of three images
    documents = Embeddings(texts, nll=torch.cat([nll, blank.double()]), predicted=torch.cat([predicted, blank]))
    weight = parameters["lambda_cap"]
    objective = build_objective(
        [
            {"type": "contrastive", "temperature": parameters["temperature"], "symmetric": True},
            {"type": "captioning", "weight": weight},
        ]
    )
    loss, metrics = objective(Embeddings(images), documents, labels_of(len(images), len(texts)))
    for name, expected in (("contrastive", "contrastive"), ("captioning", "caption")):
        yield equal(expected, metrics[f"loss_{name}"], entry["expected"][expected])
    yield equal(LOSS, loss, entry["loss"])
    (gradient,) = torch.autograd.grad(loss, [logits])  # the file's is of the term without its weight
    yield equal(f"{GRADIENT}caption_logits", gradient.norm() / weight, entry["grad_norms"]["caption_logits"])
