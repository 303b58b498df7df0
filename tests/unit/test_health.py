"""Health monitors against numbers from elsewhere, and warnings on runs that really go wrong."""

import math

import numpy as np
import pytest
import torch

from mmembed.diagnostics import alignment, duplicate_rate, effective_rank, modality_gap, uniformity
from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step
from mmembed.training.health import gradient_norms, judge, look_at, parts_of
from mmembed.training.report import render
from tests.equivalence.toy import ToyEncoder, gradients, make_batch


def test_against_loops():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 5))
    a, b = torch.tensor(x), torch.tensor(y)
    pairs = [math.exp(-2 * sum((x[i] - x[j]) ** 2)) for i in range(7) for j in range(i)]
    assert uniformity(a).item() == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert alignment(a, b).item() == pytest.approx(np.mean([sum((p - q) ** 2) for p, q in zip(x, y, strict=True)]))
    assert modality_gap(a, b).item() == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    shares = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    shares /= shares.sum()
    assert effective_rank(a).item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_ranks_that_are_known():
    assert effective_rank(torch.eye(6)).item() == pytest.approx(6)
    assert effective_rank(torch.ones(9, 4)).item() == pytest.approx(1, abs=1e-3)
    assert math.isnan(effective_rank(torch.tensor([[float("nan"), 1.0]])))
    assert duplicate_rate(torch.tensor([1, 2, 2, 3, 2])) == pytest.approx(0.4)


def observed(batch, block="contrastive", encoder=None):
    """(what the monitors saw, the step's own metrics and loss)."""
    encoder, objective, found = encoder or ToyEncoder(), build_objective(block), {}

    def observe(view, queries, documents):
        found.update(look_at(view, queries, documents, batch))

    loss, metrics = contrastive_step(encoder, objective, batch, 0, observe=observe)
    return found, {"loss": float(loss), **{key: float(value) for key, value in metrics.items()}}


def test_numbers_of_a_step():
    batch = make_batch(6, 3, 40)
    found, metrics = observed(batch)
    assert found["score_gap"] == pytest.approx(
        metrics["positive_similarity"] - metrics["negative_similarity"], rel=1e-5
    )
    assert found["alignment"] == pytest.approx(2 - 2 * metrics["positive_similarity"])  # of unit vectors
    assert found["loss_at_chance"] == pytest.approx(math.log(18), rel=1e-5)
    assert found["duplicate_rate"] == 0 and found["masked_known_positive"] == 0
    assert "modality_gap" not in found
    of_matryoshka, _ = observed(batch, {"type": "contrastive", "matryoshka": {"dims": [8, 4], "weights": [1, 2]}})
    assert of_matryoshka["loss_at_chance"] == pytest.approx(3 * math.log(18), rel=1e-5)


def test_monitors_change_nothing():
    results, batch = [], make_batch(6, 3, 25)
    for observe in (None, lambda view, queries, documents: look_at(view, queries, documents, batch)):
        encoder, objective = ToyEncoder(dropout=0.5), build_objective("contrastive")
        torch.manual_seed(7)
        loss, _ = contrastive_step(encoder, objective, batch, 20, observe=observe)
        results.append((loss, gradients(encoder, objective), torch.rand(1)))
    assert all(map(torch.equal, *results))


def with_keys(batch, **keys):
    import dataclasses

    return dataclasses.replace(batch, labels=dataclasses.replace(batch.labels, **keys))


def test_masks_are_counted_by_reason():
    """Two queries, a positive and a negative each (4 columns, 8 cells)."""
    batch = make_batch(2, 2, 10**6)
    keys = torch.tensor([1, 2, 3, 4])
    known = with_keys(  # document 4 is a positive of query 0 that was not drawn
        batch,
        document_keys=keys[:, None].expand(-1, 2),
        query_keys=torch.tensor([100, 101]),
        positive_keys=torch.tensor([[[1, 1], [4, 4]], [[3, 3], [3, 3]]]),
    )
    found, _ = observed(known)
    assert (found["masked_known_positive"], found["masked_duplicate"]) == (1 / 8, 0)
    twins = with_keys(  # both queries are the same: each one's positive answers the other
        batch,
        document_keys=keys[:, None].expand(-1, 2),
        query_keys=torch.tensor([100, 100]),
        positive_keys=torch.tensor([[[1, 1]], [[3, 3]]]),
    )
    found, metrics = observed(twins)
    assert (found["masked_known_positive"], found["masked_duplicate"]) == (0, 2 / 8)
    assert metrics["negatives"] == 2  # of 3: the cells that are counted are those that the loss leaves out
    found, metrics = observed(batch, {"type": "contrastive", "false_negative_margin": 0.0})
    assert found["masked_margin"] == pytest.approx((3 - metrics["negatives"]) * 2 / 8)


def test_gradient_norms_by_part():
    encoder, objective = (
        ToyEncoder(),
        build_objective({"type": "contrastive", "temperature": {"value": 0.1, "learn": True}}),
    )
    contrastive_step(encoder, objective, make_batch(6, 3, 40), 0, scale=8.0)
    named = [*encoder.named_parameters(), ("scale", objective.temperature.log_scale)]
    towers = {name: "language" for name, _ in named} | {"scale": "objective"}
    for adapter, part in ((True, "adapter"), (False, "language")):
        norms = gradient_norms(parts_of(named, towers, adapter), scale=8.0)
        assert norms[f"grad_norm_{part}"] == pytest.approx(gradients(encoder).norm().item() / 8, rel=1e-5)
        assert norms["grad_norm_objective"] == pytest.approx(abs(objective.temperature.log_scale.grad.item()) / 8)


# Runs that go wrong ---------------------------------------------------------------------------------------------------


def train(steps, learning_rate, change=lambda batch: batch):
    """The log of a toy encoder trained on random pairs, as a trainer would write it."""
    encoder, objective, log = ToyEncoder(), build_objective({"type": "contrastive", "temperature": 0.1}), []
    optimizer = torch.optim.SGD(encoder.parameters(), lr=learning_rate)
    for step in range(steps):
        batch, found = change(make_batch(8, 2, 10**6, seed=step)), {}

        def observe(view, queries, documents, batch=batch, found=found):
            found.update(look_at(view, queries, documents, batch))

        loss, metrics = contrastive_step(encoder, objective, batch, None, observe=observe, may_overflow=True)
        used = [parameter for name, parameter in encoder.named_parameters() if "unused" not in name]
        found |= gradient_norms({"language": used})
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step + 1, "loss": float(loss), **{k: float(v) for k, v in metrics.items()}, **found})
    return log


def diverge(steps):
    """The log of a run whose encoder has no tanh: its saturation is a zero gradient or no number, as it is rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tanh", torch.nn.Identity())
        return train(steps, 1e20)


def kinds(log):
    return {finding.kind for finding in judge(log)}


def test_a_short_ordinary_run_is_well():
    assert kinds(train(8, 0.01)) == set()


def test_pairs_that_have_nothing_in_common_collapse():
    """The best that can be done is one point for all: found as collapse, low rank, no gap, and a loss at chance."""
    assert {"collapse", "rank collapse", "no gap", "loss at chance"} <= kinds(train(150, 1.0))


def test_a_learning_rate_far_too_high_is_not_a_number():
    findings = judge(diverge(6))
    assert findings[0].step == 2 and {"not a number", "gradient of language"} <= {one.kind for one in findings}
    assert "learning_rate" in next(one.message for one in findings if one.kind == "not a number")


def test_saturated_weights_have_no_gradient():
    assert "gradient of language" in kinds(train(4, 1e4))


def test_duplicates_are_told():
    def twice(batch):
        keys = batch.labels.document_keys // 4  # of four documents each, one is left
        return with_keys(batch, document_keys=keys)

    assert kinds(train(3, 0.01, twice)) == {"duplicates"}


def test_a_finding_is_told_when_it_begins():
    well, ill = {"loss": 1.0, "duplicate_rate": 0.0}, {"loss": 1.0, "duplicate_rate": 0.9}
    log = [{**entry, "step": step} for step, entry in enumerate([well, ill, ill, well, ill])]
    assert [finding.step for finding in judge(log)] == [1, 4]


def test_an_untrained_backbone_may_begin_with_equal_vectors():
    near = {"loss": 1.0, "uniformity": -0.01, "negatives": 30.0, "effective_rank": 1.2}
    far = {"loss": 0.9, "uniformity": -1.5, "negatives": 30.0, "effective_rank": 20.0}
    assert judge([{**near, "step": 1}, {**far, "step": 10}, {**far, "step": 20}]) == []
    assert {one.kind for one in judge([{**far, "step": 1}, {**near, "step": 10}, {**near, "step": 20}])} == {
        "collapse", "rank collapse",
    }  # fmt: skip


def test_a_loss_scaler_that_settles_is_no_illness():
    """It finds its scale by overflows; an overflow without a scaler, or one that does not end, is one."""

    def log(finite, **keys):
        norms = [1.0 if fine else float("inf") for fine in finite]
        return [
            {"loss": 1.0, "step": step, "grad_norm": norm, "grad_norm_adapter": norm, **keys}
            for step, norm in enumerate(norms, start=1)
        ]

    settling = [False] * 4 + [True] * 6 + [False, True]
    assert judge(log(settling, loss_scale=2.0**12)) == []
    assert {one.step for one in judge(log(settling))} == {1, 11}
    never = judge(log([True] + [False] * 6, loss_scale=1.0))
    assert {(one.step, one.kind) for one in never} == {(6, "gradient of all"), (6, "gradient of adapter")}


def test_the_page_shows_curves_and_warnings():
    log = diverge(12)
    page = render(log, "run <1>")
    assert "Step 2: not a number" in page and "run &lt;1&gt;" in page
    well = render(train(8, 0.01), "run")
    assert well.count("<polyline") >= 2 and "http" not in (page + well).replace("http://www.w3.org", "")
    assert "Nothing ill was seen" in well and "Effective rank" in well
    assert "nothing to draw yet" in render([], "run")
