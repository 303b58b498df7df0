"""Cases of the objectives over vectors: their terms, with gradients, and the loss of the objective that YAML names.

Gradients are those of the term itself, or through the unit sphere before it where the reference has it inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.objectives import Objective, build_objective
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
from mmembed.objectives.isogclr import robust
from mmembed.objectives.metrix import pull_and_push
from mmembed.objectives.mochi import first_against_rest, hardest_of, mixed_scores
from mmembed.objectives.mv_dhel import decoupled
from mmembed.objectives.mv_infonce import ratios
from mmembed.objectives.negative_queue import against_queue
from mmembed.objectives.rafa import random_alignment
from mmembed.objectives.softmax import both_ways, info_nce
from mmembed.objectives.supcon import supcon
from mmembed.objectives.supremix import regression_contrast, regression_scores
from mmembed.objectives.uniformity import potential
from mmembed.objectives.whitened import whiten
from tests.golden.case import (
    GOLDEN,
    TOLERANCE,
    Compared,
    Entry,
    apart,
    check,
    entry_of,
    equal,
    golden,
    inputs,
    labels_of,
    on_sphere,
    tensor,
)


def through(
    block: Any,
    queries: Tensor,
    *positives: Tensor,
    negatives: Tensor | None = None,
    classes: list[int] | None = None,
    taught: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss of an objective of YAML on a batch whose queries have these positives, in this order.

    Args:
        negatives: (N, H, E), hard negatives of each query. classes: names of the positives, as ids.
        taught: a teacher's vectors of the queries and of the first positives; those of other documents are the model's.
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
    if taught is not None:
        of_documents = torch.cat([taught[1].detach().unsqueeze(1), documents.detach()[:, 1:]], 1)  # (N, V + H, E)
        labels = replace(labels, taught=(Embeddings(taught[0].detach()), Embeddings(of_documents.flatten(0, 1))))
    return build_objective(block)(*vectors, labels)[0].detach()


def agrees(of: Entry, loss: Tensor) -> Compared:
    return equal("loss of the objective", loss, of["loss"])


@golden("alignment-uniformity", "objective `alignment`", "alignment")
def alignment(of: Entry) -> Iterator[Compared]:
    x, y = inputs(of, "x", "y")
    yield from check(of, distance(x, y, of["params"]["alpha"]), x=x, y=y)
    yield agrees(of, through("alignment", x, y))


@golden("alignment-uniformity", "objective `uniformity`", "uniformity")
def uniformity(of: Entry) -> Iterator[Compared]:
    (x,) = inputs(of, "x")
    yield from check(of, potential(x, of["params"]["t"]), x=x)
    yield agrees(of, through("uniformity", x, x))


@golden("contrastive-gap", "objective `contrastive_gap`", "CUAXU total")
def contrastive_gap(of: Entry) -> Iterator[Compared]:
    image, text = inputs(of, "image", "text")
    terms = gap_terms(image, text, apart(3), 1 / of["params"]["temperature"], of["params"]["t"])
    for name, value in terms.items():
        yield equal(name, value, of["expected"][name])
    yield from check(of, sum(terms.values()), image=image, text=text)
    yield agrees(of, through("contrastive_gap", image, text))
    without = {"type": "contrastive_gap", "cross_uniform": 0.0}
    yield equal("cua", through(without, image, text), of["expected"]["cua"])


@golden("supcon", "objective `supcon`")
def supcon_of_views(of: Entry) -> Iterator[Compared]:
    (features,) = inputs(of, "features")  # (samples, views, E)
    label = torch.tensor(of["inputs"]["labels"])
    views = features.transpose(0, 1)
    yield from check(of, supcon(views, label[:, None] == label, *of["params"].values()), features=features)
    yield agrees(of, through({"type": "supcon", **of["params"]}, *views, classes=of["inputs"]["labels"]))


@golden("cwcl", "objective `cwcl`")
def cwcl(of: Entry) -> Iterator[Compared]:
    anchors, u, v = inputs(of, "anchor_modality_frozen", "u", "v")
    weights = similarity_weights(anchors)
    same = similarity_weights(inputs(entry_of("cwcl", "CWCL one direction"), "v")[0])
    yield equal("weights, of the other entry's vectors", weights, same.tolist())
    scores, both = u @ v.T / of["params"]["temperature"], "reverse" in of["name"]
    loss = weighted_contrast(scores, weights)
    yield from check(of, (loss + info_nce(scores.T, apart(3)).mean()) / 2 if both else loss, u=u, v=v)
    yield agrees(of, through({"type": "cwcl", "reverse": both}, u, v))


@golden("cacr", "objective `cacr`")
def cacr(of: Entry) -> Iterator[Compared]:
    views = [tensor(view) for view in of["inputs"]["views"]]
    pull, push = attraction(torch.stack(views)), repulsion(torch.stack(views), apart(3))
    yield equal("attraction", pull, of["expected"]["attraction"])
    yield equal("repulsion", -push, of["expected"]["repulsion"])
    yield from check(of, pull - push, view0=views[0])
    yield agrees(of, through({"type": "cacr", "views": 3}, *views))


@golden("gram", "objective `gram`")
def gram(of: Entry) -> Iterator[Compared]:
    text, video, audio = inputs(of, "text", "video", "audio")
    volume = volumes(text, torch.stack([video, audio]))
    yield equal("volume", volume, of["expected"]["volume"])
    loss = both_ways(-volume / of["params"]["temperature"], apart(3), of["params"]["label_smoothing"]).mean()
    yield from check(of, loss, text=text, video=video, audio=audio)
    yield agrees(of, through("gram", text, video, audio))


@golden("mv-infonce", "objective `mv_infonce`")
def mv_infonce(of: Entry) -> Iterator[Compared]:
    (views,) = inputs(of, "views")
    (name,) = of["grad_norms"]
    cross = "denominator" in of["params"]
    loss = -ratios(views if cross else on_sphere(views)[0], apart(3), 1 / of["params"]["temperature"], cross).mean()
    yield from check(of, loss, **{name: views})
    yield agrees(of, through({"type": "mv_infonce", "denominator": "cross" if cross else "all"}, *views))


@golden("mv-dhel", "objective `mv_dhel`")
def mv_dhel(of: Entry) -> Iterator[Compared]:
    (views,) = inputs(of, "views")
    (name,) = of["grad_norms"]
    ordered = "ordered_pairs" in of["params"]
    together, away = decoupled(views if ordered else on_sphere(views)[0], apart(3), 1 / of["params"]["temperature"])
    shift = 0.0 if ordered else torch.tensor(2.0).double().log()  # the released numerator
    yield from check(of, (away - together).mean() + shift, **{name: views})
    yield agrees(of, through("mv_dhel", *views) + shift)


@golden("amcl", "objective `amcl`")
def amcl(of: Entry) -> Iterator[Compared]:
    heads = [tensor(one) for one in of["inputs"]["heads_a"]]
    b, temperatures = inputs(of, "heads_b", "temperatures")
    contrast, regulariser = multi_head(torch.stack(heads), b, temperatures, apart(3))
    yield equal("contrastive", contrast, of["expected"]["contrastive"])
    yield equal("reg", regulariser, of["expected"]["reg"])
    yield from check(of, contrast + of["params"]["beta"] * regulariser, a0=heads[0])


@golden("whitenedcse", "objective `whitened`: `whiten`", "group whitening", "shuffled group whitening")
def group_whitening(of: Entry) -> Iterator[Compared]:
    (x,) = inputs(of, "x")
    order = of["params"]["permutation"]
    found = whiten(x, x.shape[1] // of["params"]["num_groups"], None if order is None else torch.tensor(order))
    yield from check(of, found.square().sum())
    yield equal("y", found, of["expected"]["y"])


@golden("whitenedcse", "objective `whitened`: its terms", "multi-positive InfoNCE sum")
def whitened_views_are_summed(of: Entry) -> Iterator[Compared]:
    z1, z2, z3 = inputs(of, "z1", "z2", "z3")
    scale = 1 / of["params"]["temperature"]
    anchor, *views = on_sphere(z1, z2, z3)
    yield from check(of, sum(info_nce(anchor @ view.T * scale, apart(3)).mean() for view in views), z1=z1)


@golden("clip-refine", "objective `rafa`", "RaFA")
def rafa(of: Entry) -> Iterator[Compared]:
    image, text, reference = inputs(of, "image", "text", "reference")
    yield from check(of, random_alignment(image, text, reference.detach()), image=image, text=text)


@golden("clip-refine", "objective `hycd`", "HyCD")
def hycd(of: Entry) -> Iterator[Compared]:
    image, text, teacher_image, teacher_text = inputs(of, "image", "text", "teacher_image", "teacher_text")
    teacher = (teacher_image @ teacher_text.T).detach()
    loss = distillation(image @ text.T, teacher, apart(3), of["params"]["alpha"], of["params"]["T"])
    yield from check(of, loss, image=image, text=text)
    yield agrees(of, through("hycd", image, text, taught=(teacher_image, teacher_text)))


@golden("clip-refine", "objectives `rafa`, `hycd`", "CLIP-Refine total")
def clip_refine(of: Entry) -> Iterator[Compared]:
    image, text, reference, *teacher = inputs(of, "image", "text", "reference", "teacher_image", "teacher_text")
    theirs = (teacher[0] @ teacher[1].T).detach()
    loss = random_alignment(image, text, reference.detach()) + distillation(image @ text.T, theirs, apart(3))
    yield from check(of, loss, image=image, text=text)


@golden("cleanclip", "objective `cleanclip`")
def cleanclip(of: Entry) -> Iterator[Compared]:
    image, text, image_augmented, text_augmented = inputs(of, "image", "text", "image_aug", "text_aug")
    views = torch.stack([image, text, image_augmented, text_augmented])
    yield from check(of, sum(clean_terms(views, apart(3), 1 / of["params"]["temperature"])), image=image, text=text)
    yield agrees(of, through("cleanclip", image, text, image_augmented, text_augmented))


def captions_of(of: Entry, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Captions first, then the negatives of each -> (N, E), (N, H, E)."""
    count = len(texts) // (1 + of["params"]["negatives_per_caption"])
    return texts[:count], texts[count:].unflatten(0, (count, -1))


@golden("negclip", "objective `negclip`")
def negclip(of: Entry) -> Iterator[Compared]:
    image, texts = inputs(of, "image", "texts")
    captions, negatives = captions_of(of, texts)
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    loss = global_term(image, captions, negatives, apart(2), wrong, 1 / of["params"]["temperature"])
    yield from check(of, loss, image=image, texts=texts)
    yield agrees(of, through("negclip", image, captions, negatives=negatives))


@golden("degla", "objective `degla`", "image-grounded contrast")
def grounded_in_images(of: Entry) -> Iterator[Compared]:
    image, texts = inputs(of, "image", "texts")
    captions, negatives = captions_of(of, texts)
    loss = grounded(image, captions, negatives, torch.ones(2, 2, dtype=torch.bool), 1 / of["params"]["temperature"])
    yield from check(of, loss, image=image, texts=texts)
    block = {"type": "degla", "image_grounded": 1.0, "text_grounded": 0.0}
    whole = through(block, image, captions, negatives=negatives, taught=(image, captions))
    yield equal("loss of the objective, NegCLIP's with it", whole, GOLDEN["negclip"][0]["loss"] + of["loss"])


@golden("degla", "objective `degla`: `grounded`", "text-grounded contrast")
def grounded_in_texts(of: Entry) -> Iterator[Compared]:
    texts, teacher = inputs(of, "texts", "teacher_caption")
    captions, negatives = captions_of(of, texts)
    exists = torch.ones(2, 2, dtype=torch.bool)
    yield from check(of, grounded(captions, teacher.detach(), negatives, exists, of["params"]["scale"]), texts=texts)
    block = {"type": "degla", "image_grounded": 0.0, "distillation": 0.0}
    without, whole = (
        through({**block, "text_grounded": weight}, captions, captions, negatives=negatives, taught=(captions, teacher))
        for weight in (0.0, 1.0)
    )
    yield equal("its share of the loss of the objective", whole - without, of["loss"])


@golden("alip", "objective `alip`")
def alip(of: Entry) -> Iterator[Compared]:
    image, text, caption = inputs(of, "image", "raw_text", "synthetic_caption")
    views = torch.stack([image, text, caption])
    decay, scale = of["params"]["ema"], 1 / of["params"]["temperature"]
    found = agreement(views)
    weights = gates(found, decay * of["params"]["H_init"] + (1 - decay) * found.mean(1), of["params"]["gamma"])
    for name, weight in zip(("w_sample", "w_raw", "w_caption"), weights, strict=True):
        yield equal(name, weight, of["expected"][name])
    sample, raw, synthetic = weights
    terms = raw * both_ways(image @ text.T * scale, apart(3)) + synthetic * both_ways(
        image @ caption.T * scale, apart(3)
    )
    yield from check(of, (sample * terms).mean(), image=image)
    yield agrees(of, through("alip", image, text, caption))


@golden("dreamlip", "objective `dreamlip`")
def dreamlip(of: Entry) -> Iterator[Compared]:
    image, captions = inputs(of, "image", "sub_captions")
    loss = multi_caption(image, captions, apart(3), 1 / of["params"]["temperature"])
    yield from check(of, loss, image=image, sub_captions=captions)
    yield agrees(of, through("dreamlip", image, *captions.unbind(1)))


@golden("tcl", "objective `tcl`: `against_queue`", "intra-modal contrastive term")
def tcl_within_a_modality(of: Entry) -> Iterator[Compared]:
    feat, augmented, queue = inputs(of, "feat", "feat_momentum_aug", "queue")
    unknown = torch.zeros(3, 3, dtype=torch.bool)
    loss = against_queue(feat, augmented, queue, apart(3), unknown, 1 / of["params"]["temperature"])
    yield from check(of, loss, feat=feat)


@golden("tcl", "objective `global_local`", "global-local intra-modal term")
def tcl_of_the_parts(of: Entry) -> Iterator[Compared]:
    local, means = inputs(of, "local", "global_")
    mask = torch.ones(local.shape[:2], dtype=torch.bool)
    loss = of_parts(means, local, mask, apart(2), 1 / of["params"]["temperature"])
    yield from check(of, loss, local=local, global_=means)


@golden("isogclr", "objective `isogclr`")
def isogclr_visits(of: Entry) -> Iterator[Compared]:
    """Losses, gradients, running normalisers and temperatures; the second visit goes on from the first."""
    first, second = GOLDEN["isogclr"]
    parameters = first["params"]
    options = {
        "temperature": parameters["tau_init"],
        **{name: parameters[name] for name in ("gamma", "rho", "eta", "beta")},
        "lowest": parameters["tau_min"],
        "highest": parameters["tau_max"],
    }
    objective = build_objective({"type": "isogclr", **options}).double()
    if of is second:
        list(visit(objective, first, parameters["gamma"]))
        temperatures = state_of(objective)[:, [1, 4]]  # of the images, of the texts
        for side, found in zip(("img", "txt"), temperatures.T, strict=True):
            yield equal(f"temperatures before, {side}", found, second["expected"][f"tau_{side}_used"])
    yield from visit(objective, of, parameters["gamma"])
    if of is first:
        yield equal("temperatures after", state_of(objective)[:, 1], first["expected"]["tau_img_next"])


def visit(objective: Objective, of: Entry, gamma: float) -> Iterator[Compared]:
    """The objective sees the batch and remembers it."""
    image, text = inputs(of, "img", "txt")
    gathered = objective.gather(Embeddings(image), Embeddings(text), one_positive(3))
    yield agrees(of, objective.compare(gathered)[0])
    scores, states = image @ text.T, objective.recall(gathered)
    both = [robust(one, apart(3), state, gamma)[0] for one, state in zip((scores, scores.T), states, strict=True)]
    yield from check(of, sum(both).mean() / 2, q=image, p=text, img=image, txt=text)  # as either entry names them
    objective.remember(gathered)
    objective.commit()
    expected = of["expected"]["u_img"]
    yield equal("u", state_of(objective)[:, 0].exp(), expected, TOLERANCE * min(expected))


def state_of(objective: Objective) -> Tensor:
    """What is remembered of the three pairs."""
    rows, known = objective.memory.find(torch.arange(3) + 3 * 1_000_003)  # of size 3
    assert known.all()
    return rows


@golden("contriever", "objective `negative_queue`", "MoCo queue")
@golden("esimcse", "objective `negative_queue`", "ESimCSE")
def negative_queue(of: Entry) -> Iterator[Compared]:
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
    yield agrees(of, objective(Embeddings(queries), Embeddings(keys), one_positive(3))[0])
    if not in_batch:  # the keys are the momentum encoder's, whatever the model itself makes of them
        objective.momentum = 0.9995
        labels = replace(one_positive(3), taught=(Embeddings(queries.flip(1)), Embeddings(keys)))
        loss, _ = objective(Embeddings(queries), Embeddings(keys.flip(0)), labels)
        yield equal("loss with a momentum encoder", loss, of["loss"])
    same, known = apart(3) if in_batch else torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, len(queue)).bool()
    sides = on_sphere(queries, keys) if in_batch else (queries, keys)  # MoCo's own code has unit vectors already
    scale, smoothing = 1 / of["params"]["temperature"], block["label_smoothing"]
    named = {query: queries, key: keys}
    loss = against_queue(*sides, queue.detach(), same, known, scale, smoothing)
    yield from check(of, loss, **{name: named[name] for name in of["grad_norms"]})


@golden("mochi", "objective `mochi`: its terms")
def mochi(of: Entry) -> Iterator[Compared]:
    query, key, queue = inputs(of, "q", "k", "queue")
    params, fixed, scores = of["params"], queue.detach(), query @ queue.detach().T
    hard, exists = hardest_of(scores.detach(), torch.zeros(1, 4, dtype=torch.bool), params["N"])
    assert exists.all()
    yield equal("hardest", hard, of["expected"]["hardest"], 0.0)
    first, second = hard[0].tolist()
    between, itself = fixed[first] @ fixed[second], (query * query.detach()).sum(1)
    mixed = [
        mixed_scores(scores[:, first], scores[:, second], between, params["alpha"]),
        mixed_scores(itself, scores[:, first], scores[:, first].detach(), params["beta"]),
    ]
    for score, name in zip(mixed, ("h", "h_prime"), strict=True):
        mixture = tensor(of["expected"][name], grad=False)
        yield equal(f"score of {name}", score, (query[0] @ mixture).item())
    row = torch.cat([(query * key).sum(1, keepdim=True), scores, torch.stack(mixed, 1)], 1) / params["temperature"]
    yield from check(of, first_against_rest(row, torch.zeros_like(row, dtype=torch.bool)).mean(), q=query)


@golden("metrix", "objective `metrix`: its terms")
def metrix(of: Entry) -> Iterator[Compared]:
    distances = tensor(of["inputs"]["distances_anchor_to_mix_diag"], grad=False)
    pull, push = pull_and_push(distances, of["params"]["lam"], of["params"]["neg_margin"])
    yield equal("pos", pull, of["expected"]["pos"])
    yield equal("neg", push, of["expected"]["neg"])
    yield from check(of, (pull + push).mean())


@golden("supremix", "objective `supremix`: its terms")
def supremix(of: Entry) -> Iterator[Compared]:
    """The anchor's row; its mixture is of sample 2 (of 2 and 3 they are alike), which the draws have to choose."""
    vectors, numbers = inputs(of, "z", "labels")
    params, anchor = of["params"], of["params"].get("anchor", of["inputs"].get("anchor", 0))
    draws = torch.zeros(4, 4, 4, dtype=torch.float64)
    draws[:, :, 2] = 0.5
    draws[3].fill_diagonal_(params["lam_neg"])
    scores, weights, positive = regression_scores(vectors, numbers.detach(), torch.eye(4).bool(), draws)
    row = [one[anchor : anchor + 1] for one in (scores / params["temperature"], weights, positive)]
    yield from check(of, regression_contrast(*row).mean(), z=vectors)


def one_positive(count: int) -> BatchLabels:
    return replace(labels_of(count, count), source="golden")
