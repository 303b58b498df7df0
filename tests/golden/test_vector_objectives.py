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
from mmembed.objectives.amcl import multi_head
from mmembed.objectives.cacr import attraction, repulsion
from mmembed.objectives.contrastive_gap import gap_terms
from mmembed.objectives.cwcl import similarity_weights, weighted_contrast
from mmembed.objectives.gram import volumes
from mmembed.objectives.mv_dhel import decoupled
from mmembed.objectives.mv_infonce import ratios
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
