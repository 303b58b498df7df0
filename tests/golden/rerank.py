"""Cases of rerankers: losses of the logits of pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmembed.embeddings import Embeddings
from mmembed.objectives import build_objective
from tests.golden.case import LOSS, Compared, Entry, check, equal, golden, inputs, labels_of, tensor

NAMES = {"sft": "sft", "cl": "contrastive"}


def compared(block: object, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective of the logits (D, 2) of one query's documents, the first of which is relevant."""
    objective = build_objective(block)
    return objective(Embeddings(logits[:1]), Embeddings(logits), labels_of(1, len(logits), len(logits), False))


@golden("gmr", "objective `ranking` with `sft`", "SFT (yes/no)")
def sft(entry: Entry) -> Iterator[Compared]:
    yes, no = inputs(entry, "z_yes", "z_no")
    logits = torch.stack([yes, no], dim=1)
    loss, _ = compared("sft", logits)
    yield from check(entry, loss, z_yes=yes, z_no=no)
    expected = entry["expected"]
    yield equal("gradient at z_yes", yes.grad, expected["grad_z_yes"])
    yield equal("gradient at z_no", no.grad, expected["grad_z_no"])
    yield equal("score", logits.softmax(1)[:, 0], expected["score"])
    _, weights = compared("weight_direction", logits.detach())
    yield equal("W_pos", weights["weight_positive"], expected["W_pos"])
    yield equal("W_neg", weights["weight_negative"], sum(expected["W_neg"]) / 2)


@golden("gmr", "objective `ranking` with `infonce`", "CL (InfoNCE")
def contrastive(entry: Entry) -> Iterator[Compared]:
    (yes,) = inputs(entry, "z_yes")
    loss, _ = compared({"type": "ranking", "loss": "infonce", "score": "yes"}, torch.stack([yes, yes * 0], dim=1))
    yield from check(entry, loss, z_yes=yes)
    expected = entry["expected"]
    yield equal("weights", yes.grad, [-expected["W_pos"], *expected["W_neg"]])


@golden("gmr", "objective `weight_direction`", "URL")
def weights_and_directions(entry: Entry) -> Iterator[Compared]:
    given = entry["inputs"]
    rows = torch.stack([tensor(given[name], grad=False) for name in ("M_yes", "M_no")])  # (2, H)
    for name, expected in entry["expected"].items():
        weight, direction = (NAMES[part[2:]] for part in name.split("+"))
        hidden = tensor(given["H"])
        block = {"type": "weight_direction", "weight": weight, "direction": direction}
        loss, _ = compared(block, hidden @ rows.T)
        loss.backward()
        yield equal(name, loss, expected["surrogate"])
        if name == "W_sft+D_cl":
            yield equal(LOSS, loss, entry["loss"])
        yield equal(f"{name}, gradient at H", hidden.grad, expected["grad_H"])


@golden("gmr", "objective `ranking` with `sft` on one logit", "yes/no softmax equals")
def one_logit(entry: Entry) -> Iterator[Compared]:
    given = entry["inputs"]
    hidden = tensor(given["H"])
    row = tensor(given["w_yes"], grad=False) - tensor(given["w_no"], grad=False)
    logits = hidden @ row[:, None]  # (D, 1)
    loss, _ = compared("sft", logits)
    yield from check(entry, loss, H=hidden)
    yield equal("score", torch.sigmoid(logits[:, 0]), entry["expected"]["score"])
