"""Objectives over vectors against values computed outside this repository (losses.json): loss and gradient norms.

Gradients are those of the term itself, or through the unit sphere before it where the reference has it inside.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.objectives import build_objective
from mmembed.objectives.alignment import distance
from mmembed.objectives.alip import agreement, gates
from mmembed.objectives.amcl import multi_head
from mmembed.objectives.cacr import attraction, repulsion
from mmembed.objectives.cleanclip import clean_terms
from mmembed.objectives.contrastive_gap import gap_terms
from mmembed.objectives.cwcl import similarity_weights, weighted_contrast
from mmembed.objectives.degla import global_term, grounded
from mmembed.objectives.dreamlip import multi_caption
from mmembed.objectives.global_local import of_parts
from mmembed.objectives.gram import volumes
from mmembed.objectives.hycd import distillation
from mmembed.objectives.isogclr import State, robust
from mmembed.objectives.metrix import mixed_distances, pull_and_push
from mmembed.objectives.mochi import first_against_rest, hardest_of, mixed_scores
from mmembed.objectives.mv_dhel import decoupled
from mmembed.objectives.mv_infonce import ratios
from mmembed.objectives.negative_queue import against_queue
from mmembed.objectives.rafa import random_alignment
from mmembed.objectives.softmax import both_ways, info_nce
from mmembed.objectives.supcon import supcon
from mmembed.objectives.uniformity import potential
from mmembed.objectives.whitened import whiten

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())
TOLERANCE = 1e-6


def entry(slug: str, name: str) -> dict:
    (found,) = [one for one in GOLDEN[slug] if one["name"] == name]
    return found


def inputs(of: dict, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(of["inputs"][name], dtype=torch.float64, requires_grad=True) for name in names]


def on_sphere(*vectors: torch.Tensor) -> list[torch.Tensor]:
    """For the references that differentiate through the normalisation."""
    return [functional.normalize(one, dim=-1) for one in vectors]


def check(of: dict, loss: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Loss, and the gradient norms of the tensors; none of the entry's is passed over."""
    loss.backward()
    assert loss.item() == pytest.approx(of["loss"], abs=TOLERANCE)
    assert set(tensors) == set(of["grad_norms"])
    for name, tensor in tensors.items():
        assert tensor.grad.norm().item() == pytest.approx(of["grad_norms"][name], abs=TOLERANCE), name


def apart(count: int) -> torch.Tensor:
    """No two pairs are the same."""
    return torch.eye(count, dtype=torch.bool)


def through(block, queries, *positives, negatives=None, classes=None) -> torch.Tensor:
    """The loss of an objective of YAML on a batch whose queries have these positives, in this order.

    Args:
        negatives: (N, H, E), hard negatives of each query. classes: names of the positives, as ids.
    """
    count, held = len(queries), 0 if negatives is None else negatives.shape[1]
    per_query = len(positives) + held
    groups = torch.stack(positives, 1)  # (N, V, E)
    documents = groups if negatives is None else torch.cat([groups, negatives], 1)
    keys = torch.arange(count * per_query).view(count, per_query) + 1000
    ids = keys.clone()
    if classes is not None:
        ids[:, 0] = torch.tensor(classes)
    document_keys = torch.stack([keys, ids], -1)  # (N, V + H, 2)
    labels = BatchLabels(
        owner=torch.arange(count).repeat_interleave(per_query),
        relevance=torch.tensor([1.0] * len(positives) + [0.0] * held).repeat(count),
        document_keys=document_keys.flatten(0, 1),
        query_keys=torch.arange(count),
        positive_keys=document_keys[:, : len(positives)],
        source="golden",
    )
    vectors = Embeddings(queries.detach()), Embeddings(documents.detach().flatten(0, 1))
    return build_objective(block)(*vectors, labels)[0].detach()


def agrees(of: dict, loss: torch.Tensor) -> None:
    assert loss.item() == pytest.approx(of["loss"], abs=TOLERANCE)


def test_alignment() -> None:
    of = entry("alignment-uniformity", "alignment")
    x, y = inputs(of, "x", "y")
    check(of, distance(x, y, of["params"]["alpha"]), x=x, y=y)
    agrees(of, through("alignment", x, y))


def test_uniformity() -> None:
    of = entry("alignment-uniformity", "uniformity")
    (x,) = inputs(of, "x")
    check(of, potential(x, of["params"]["t"]), x=x)
    agrees(of, through("uniformity", x, x))


def test_contrastive_gap() -> None:
    of = entry("contrastive-gap", "CUAXU total")
    image, text = inputs(of, "image", "text")
    terms = gap_terms(image, text, apart(3), 1 / of["params"]["temperature"], of["params"]["t"])
    for name, value in terms.items():
        assert value.item() == pytest.approx(of["expected"][name], abs=TOLERANCE), name
    check(of, sum(terms.values()), image=image, text=text)
    agrees(of, through("contrastive_gap", image, text))
    without = {"type": "contrastive_gap", "cross_uniform": 0.0}
    assert through(without, image, text).item() == pytest.approx(of["expected"]["cua"], abs=TOLERANCE)


@pytest.mark.parametrize("of", GOLDEN["supcon"], ids=lambda of: of["name"])
def test_supcon(of) -> None:
    (features,) = inputs(of, "features")  # (samples, views, E)
    label = torch.tensor(of["inputs"]["labels"])
    views = features.transpose(0, 1)
    check(of, supcon(views, label[:, None] == label, *of["params"].values()), features=features)
    agrees(of, through({"type": "supcon", **of["params"]}, *views, classes=of["inputs"]["labels"]))


@pytest.mark.parametrize("of", GOLDEN["cwcl"], ids=lambda of: of["name"])
def test_cwcl(of) -> None:
    anchors, u, v = inputs(of, "anchor_modality_frozen", "u", "v")
    weights = similarity_weights(anchors)
    torch.testing.assert_close(
        similarity_weights(inputs(entry("cwcl", "CWCL one direction"), "v")[0]), weights, atol=TOLERANCE, rtol=0
    )
    scores, both = u @ v.T / of["params"]["temperature"], "reverse" in of["name"]
    loss = weighted_contrast(scores, weights)
    check(of, (loss + info_nce(scores.T, apart(3)).mean()) / 2 if both else loss, u=u, v=v)
    agrees(of, through({"type": "cwcl", "reverse": both}, u, v))


def test_cacr() -> None:
    (of,) = GOLDEN["cacr"]
    views = [torch.tensor(view, dtype=torch.float64, requires_grad=True) for view in of["inputs"]["views"]]
    pull, push = attraction(torch.stack(views)), repulsion(torch.stack(views), apart(3))
    assert pull.item() == pytest.approx(of["expected"]["attraction"], abs=TOLERANCE)
    assert -push.item() == pytest.approx(of["expected"]["repulsion"], abs=TOLERANCE)
    check(of, pull - push, view0=views[0])
    agrees(of, through({"type": "cacr", "views": 3}, *views))


def test_gram() -> None:
    (of,) = GOLDEN["gram"]
    text, video, audio = inputs(of, "text", "video", "audio")
    volume = volumes(text, torch.stack([video, audio]))
    torch.testing.assert_close(
        volume, torch.tensor(of["expected"]["volume"], dtype=torch.float64), atol=TOLERANCE, rtol=0
    )
    logits = -volume / of["params"]["temperature"]
    check(of, both_ways(logits, apart(3), of["params"]["label_smoothing"]).mean(), text=text, video=video, audio=audio)
    agrees(of, through("gram", text, video, audio))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modalities", [3, 4])
def test_gram_where_modalities_coincide(dtype, modalities) -> None:
    """The determinant is 0 there; the gradient of its root must be finite."""
    views = functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=dtype), dim=-1)
    anchors, others = views.clone().requires_grad_(), views.expand(modalities - 1, -1, -1).clone().requires_grad_()
    both_ways(-volumes(anchors, others) / 0.07, apart(4)).mean().backward()
    assert torch.isfinite(anchors.grad).all() and torch.isfinite(others.grad).all()


def test_gram_volume_of_four_modalities() -> None:
    """Against the determinant of torch.linalg."""
    views = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = functional.normalize(views, dim=-1)
    rows = torch.stack([torch.stack([views[0, 0], *views[1:, j]]) for j in range(3)])  # (3, 4, E)
    expected = torch.linalg.det(rows @ rows.mT).sqrt()
    torch.testing.assert_close(volumes(views[0], views[1:])[0], expected)


@pytest.mark.parametrize("of", GOLDEN["mv-infonce"], ids=lambda of: of["name"])
def test_mv_infonce(of) -> None:
    (views,) = inputs(of, "views")
    (name,) = of["grad_norms"]
    cross = "denominator" in of["params"]
    loss = -ratios(views if cross else on_sphere(views)[0], apart(3), 1 / of["params"]["temperature"], cross).mean()
    check(of, loss, **{name: views})
    agrees(of, through({"type": "mv_infonce", "denominator": "cross" if cross else "all"}, *views))


@pytest.mark.parametrize("of", GOLDEN["mv-dhel"], ids=lambda of: of["name"])
def test_mv_dhel(of) -> None:
    (views,) = inputs(of, "views")
    (name,) = of["grad_norms"]
    ordered = "ordered_pairs" in of["params"]
    together, away = decoupled(views if ordered else on_sphere(views)[0], apart(3), 1 / of["params"]["temperature"])
    shift = 0.0 if ordered else torch.tensor(2.0).double().log()  # the released numerator
    check(of, (away - together).mean() + shift, **{name: views})
    agrees(of, through("mv_dhel", *views) + shift)


def test_amcl() -> None:
    (of,) = GOLDEN["amcl"]
    heads = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in of["inputs"]["heads_a"]]
    b, temperatures = inputs(of, "heads_b", "temperatures")
    contrast, regulariser = multi_head(torch.stack(heads), b, temperatures, apart(3))
    assert contrast.item() == pytest.approx(of["expected"]["contrastive"], abs=TOLERANCE)
    assert regulariser.item() == pytest.approx(of["expected"]["reg"], abs=TOLERANCE)
    check(of, contrast + of["params"]["beta"] * regulariser, a0=heads[0])


@pytest.mark.parametrize("of", GOLDEN["whitenedcse"][:2], ids=lambda of: of["name"])
def test_group_whitening(of) -> None:
    (x,) = inputs(of, "x")
    order = of["params"]["permutation"]
    found = whiten(x, x.shape[1] // of["params"]["num_groups"], None if order is None else torch.tensor(order))
    torch.testing.assert_close(found, torch.tensor(of["expected"]["y"], dtype=torch.float64), atol=TOLERANCE, rtol=0)
    assert found.square().sum().item() == pytest.approx(of["loss"], abs=TOLERANCE)


def test_whitened_views_are_summed() -> None:
    of = entry("whitenedcse", "multi-positive InfoNCE sum")
    z1, z2, z3 = inputs(of, "z1", "z2", "z3")
    scale = 1 / of["params"]["temperature"]
    anchor, *views = on_sphere(z1, z2, z3)
    check(of, sum(info_nce(anchor @ view.T * scale, apart(3)).mean() for view in views), z1=z1)


def test_rafa() -> None:
    of = entry("clip-refine", "RaFA")
    image, text, reference = inputs(of, "image", "text", "reference")
    check(of, random_alignment(image, text, reference.detach()), image=image, text=text)


def test_hycd() -> None:
    of = entry("clip-refine", "HyCD")
    image, text, teacher_image, teacher_text = inputs(of, "image", "text", "teacher_image", "teacher_text")
    teacher = (teacher_image @ teacher_text.T).detach()
    loss = distillation(image @ text.T, teacher, apart(3), of["params"]["alpha"], of["params"]["T"])
    check(of, loss, image=image, text=text)


def test_clip_refine() -> None:
    of = entry("clip-refine", "CLIP-Refine total")
    image, text, reference, *teacher = inputs(of, "image", "text", "reference", "teacher_image", "teacher_text")
    theirs = (teacher[0] @ teacher[1].T).detach()
    loss = random_alignment(image, text, reference.detach()) + distillation(image @ text.T, theirs, apart(3))
    check(of, loss, image=image, text=text)


def test_cleanclip() -> None:
    (of,) = GOLDEN["cleanclip"]
    image, text, image_augmented, text_augmented = inputs(of, "image", "text", "image_aug", "text_aug")
    views = torch.stack([image, text, image_augmented, text_augmented])
    check(of, sum(clean_terms(views, apart(3), 1 / of["params"]["temperature"])), image=image, text=text)
    agrees(of, through("cleanclip", image, text, image_augmented, text_augmented))


def captions_of(of: dict, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions first, then the negatives of each -> (N, E), (N, H, E)."""
    count = len(texts) // (1 + of["params"]["negatives_per_caption"])
    return texts[:count], texts[count:].unflatten(0, (count, -1))


def test_negclip() -> None:
    (of,) = GOLDEN["negclip"]
    image, texts = inputs(of, "image", "texts")
    captions, negatives = captions_of(of, texts)
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    loss = global_term(image, captions, negatives, apart(2), wrong, 1 / of["params"]["temperature"])
    check(of, loss, image=image, texts=texts)
    agrees(of, through("negclip", image, captions, negatives=negatives))


def test_degla() -> None:
    by_image, by_text = entry("degla", "image-grounded contrast"), entry("degla", "text-grounded contrast")
    image, texts = inputs(by_image, "image", "texts")
    captions, negatives = captions_of(by_image, texts)
    exists = torch.ones(2, 2, dtype=torch.bool)
    loss = grounded(image, captions, negatives, exists, 1 / by_image["params"]["temperature"])
    check(by_image, loss, image=image, texts=texts)
    texts, teacher = inputs(by_text, "texts", "teacher_caption")
    captions, negatives = captions_of(by_text, texts)
    loss = grounded(captions, teacher.detach(), negatives, exists, by_text["params"]["scale"])
    check(by_text, loss, texts=texts)
    weightless = through(
        {"type": "degla", "image_grounded": 1.0, "text_grounded": 0.0}, image, captions, negatives=negatives
    )
    expected = GOLDEN["negclip"][0]["loss"] + by_image["loss"]
    assert weightless.item() == pytest.approx(expected, abs=TOLERANCE)


def test_alip() -> None:
    (of,) = GOLDEN["alip"]
    image, text, caption = inputs(of, "image", "raw_text", "synthetic_caption")
    views = torch.stack([image, text, caption])
    decay, scale = of["params"]["ema"], 1 / of["params"]["temperature"]
    found = agreement(views)
    weights = gates(found, decay * of["params"]["H_init"] + (1 - decay) * found.mean(1), of["params"]["gamma"])
    for name, weight in zip(("w_sample", "w_raw", "w_caption"), weights, strict=True):
        assert weight.tolist() == pytest.approx(of["expected"][name], abs=TOLERANCE), name
    sample, raw, synthetic = weights
    terms = raw * both_ways(image @ text.T * scale, apart(3)) + synthetic * both_ways(
        image @ caption.T * scale, apart(3)
    )
    check(of, (sample * terms).mean(), image=image)
    agrees(of, through("alip", image, text, caption))


def test_dreamlip() -> None:
    (of,) = GOLDEN["dreamlip"]
    image, captions = inputs(of, "image", "sub_captions")
    loss = multi_caption(image, captions, apart(3), 1 / of["params"]["temperature"])
    check(of, loss, image=image, sub_captions=captions)
    agrees(of, through("dreamlip", image, *captions.unbind(1)))


def test_tcl_within_a_modality() -> None:
    of = entry("tcl", "intra-modal contrastive term")
    feat, augmented, queue = inputs(of, "feat", "feat_momentum_aug", "queue")
    unknown = torch.zeros(3, 3, dtype=torch.bool)
    loss = against_queue(feat, augmented, queue, apart(3), unknown, 1 / of["params"]["temperature"])
    check(of, loss, feat=feat)


def test_tcl_of_the_parts() -> None:
    of = entry("tcl", "global-local intra-modal term")
    local, means = inputs(of, "local", "global_")
    mask = torch.ones(local.shape[:2], dtype=torch.bool)
    check(of, of_parts(means, local, mask, apart(2), 1 / of["params"]["temperature"]), local=local, global_=means)


def test_isogclr_visits() -> None:
    """Two visits: losses, gradients, running normalisers and temperatures."""
    first, second = GOLDEN["isogclr"]
    options = {
        "temperature": first["params"]["tau_init"],
        "gamma": first["params"]["gamma"],
        "rho": first["params"]["rho"],
        "eta": first["params"]["eta"],
        "beta": first["params"]["beta"],
        "lowest": first["params"]["tau_min"],
        "highest": first["params"]["tau_max"],
    }
    objective = build_objective({"type": "isogclr", **options}).double()
    taus = []
    for of, names in ((first, ("q", "p")), (second, ("img", "txt"))):
        image, text = inputs(of, "img", "txt")
        gathered = objective.gather(Embeddings(image), Embeddings(text), one_positive(3))
        agrees(of, objective.compare(gathered)[0])
        scores, states = image @ text.T, objective.recall(gathered)
        both = [
            robust(one, apart(3), state, options["gamma"])[0]
            for one, state in zip((scores, scores.T), states, strict=True)
        ]
        check(of, sum(both).mean() / 2, **dict(zip(names, (image, text), strict=True)))
        objective.remember(gathered)
        objective.commit()
        rows, known = objective.memory.find(torch.arange(3) + 3 * 1_000_003)  # of size 3
        assert known.all()
        assert rows[:, 0].exp().tolist() == pytest.approx(of["expected"]["u_img"], rel=TOLERANCE)
        taus.append((rows[:, 1].tolist(), rows[:, 4].tolist()))
    assert taus[0][0] == pytest.approx(first["expected"]["tau_img_next"], abs=TOLERANCE)
    assert taus[0][0] == pytest.approx(second["expected"]["tau_img_used"], abs=TOLERANCE)
    assert taus[0][1] == pytest.approx(second["expected"]["tau_txt_used"], abs=TOLERANCE)


def test_isogclr_does_not_overflow_at_its_lowest_temperature() -> None:
    """e^(2 / .005) is no float; the weights are."""
    state = State(torch.zeros(2), torch.full((2,), 0.005), torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    scores = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], requires_grad=True)
    surrogate, log_u, _ = robust(scores, apart(2), state, 0.8)
    surrogate.sum().backward()
    assert torch.isfinite(scores.grad).all() and log_u.tolist() == pytest.approx([400.0, 400.0])


@pytest.mark.parametrize("of", GOLDEN["contriever"] + GOLDEN["esimcse"], ids=lambda of: of["name"])
def test_negative_queue(of) -> None:
    in_batch = "z" in of["inputs"]
    query, key = ("z", "z_repeated") if in_batch else ("q", "k")
    queries, keys, queue = inputs(of, query, key, "queue")
    block = {
        "type": "negative_queue",
        "temperature": of["params"]["temperature"],
        "size": len(queue),
        "in_batch": in_batch,
        "label_smoothing": of["params"].get("label_smoothing", 0.0),
    }
    objective = build_objective(block, 3).double()
    objective.queue.put(queue.detach(), torch.arange(len(queue) * 2).view(-1, 2) - 100)
    agrees(of, objective(Embeddings(queries), Embeddings(keys), one_positive(3))[0])
    same, known = apart(3) if in_batch else torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, len(queue)).bool()
    sides = on_sphere(queries, keys) if in_batch else (queries, keys)  # MoCo's own code has unit vectors already
    scale, smoothing = 1 / of["params"]["temperature"], block["label_smoothing"]
    named = {query: queries, key: keys}
    loss = against_queue(*sides, queue.detach(), same, known, scale, smoothing)
    check(of, loss, **{name: named[name] for name in of["grad_norms"]})


def test_mochi() -> None:
    (of,) = GOLDEN["mochi"]
    query, key, queue = inputs(of, "q", "k", "queue")
    params, fixed, scores = of["params"], queue.detach(), query @ queue.detach().T
    hard, exists = hardest_of(scores.detach(), torch.zeros(1, 4, dtype=torch.bool), params["N"])
    assert hard.tolist() == [of["expected"]["hardest"]] and exists.all()
    first, second = hard[0].tolist()
    between, itself = fixed[first] @ fixed[second], (query * query.detach()).sum(1)
    mixed = [
        mixed_scores(scores[:, first], scores[:, second], between, params["alpha"]),
        mixed_scores(itself, scores[:, first], scores[:, first].detach(), params["beta"]),
    ]
    for score, name in zip(mixed, ("h", "h_prime"), strict=True):
        mixture = torch.tensor(of["expected"][name], dtype=torch.float64)
        assert score.item() == pytest.approx((query[0] @ mixture).item(), abs=TOLERANCE)
    row = torch.cat([(query * key).sum(1, keepdim=True), scores, torch.stack(mixed, 1)], 1) / params["temperature"]
    check(of, first_against_rest(row, torch.zeros_like(row, dtype=torch.bool)).mean(), q=query)


def test_metrix() -> None:
    (of,) = GOLDEN["metrix"]
    distances = torch.tensor(of["inputs"]["distances_anchor_to_mix_diag"])
    pull, push = pull_and_push(distances, of["params"]["lam"], of["params"]["neg_margin"])
    assert pull.tolist() == pytest.approx(of["expected"]["pos"]) and push.tolist() == pytest.approx(
        of["expected"]["neg"]
    )
    agrees(of, (pull + push).mean())


def test_distances_of_mixtures_against_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, positives = (functional.normalize(torch.randn(4, 6, generator=draw), dim=1) for _ in range(2))
    found = mixed_distances(queries, positives, 0.3)
    for i in range(4):
        for j in range(4):
            mixed = functional.normalize(0.3 * positives[i] + 0.7 * positives[j], dim=0)
            assert found[i, j].item() == pytest.approx((queries[i] - mixed).norm().item(), abs=1e-5)


def one_positive(count: int) -> BatchLabels:
    keys = torch.arange(count).view(-1, 1).expand(-1, 2) + 1000
    position = torch.arange(count)
    return BatchLabels(position, torch.ones(count), keys, position, keys.unsqueeze(1), source="golden")
