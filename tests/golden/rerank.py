"""Cases of rerankers: losses of the logits of pairs, and lists that are read together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmembed.backbones.block_attention import Blocks, attend_blocks, document_shares, position_ids, visible
from mmembed.backbones.shared_prefix import flatten, masked_attention
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


@golden("blockrank", "head `attention`, objective `ranking` with `infonce`", "auxiliary attention loss")
def attention_read(entry: Entry) -> Iterator[Compared]:
    (logits,) = inputs(entry, "attention_scores")  # (1, H, R, 8): four blocks of two tokens
    real = torch.tensor(entry["inputs"]["attention_mask"][0][1:-1])  # (2, 2) of the documents
    shares = document_shares(logits[0, :, :, 2:6], real)  # (2,)
    block = {"type": "ranking", "loss": "infonce", "temperature": entry["params"]["temperature"]}
    loss, _ = compared(block, shares[:, None])  # the answer is the first document
    if "expected" in entry:
        yield equal("doc_scores", shares, entry["expected"]["doc_scores"])
        yield equal("logits", shares / entry["params"]["temperature"], entry["expected"]["logits"])
    given = {"attention_scores": logits} if entry.get("grad_norms") else {}
    yield from check(entry, loss, **given)


@golden("blockrank", "attention of a list", "block-structured attention", trains=False)
def block_attention(entry: Entry) -> Iterator[Compared]:
    """The file's blocks have their padding on the left; ours on the right, and only the documents any."""
    query, key, value = (tensor(entry["inputs"][name], grad=False) for name in ("q", "k", "v"))  # (1, H, S, D)
    real = torch.tensor(entry["inputs"]["attention_mask"])  # (N + 2, T)
    blocks, length = real.shape
    tokens = [torch.arange(length)[one] + number * length for number, one in enumerate(real)]
    order = [tokens[0]]
    for one in tokens[1:-1]:
        order.append(torch.cat([one, one.new_zeros(length - len(one))]))
    there = torch.tensor([[place < len(one) for place in range(length)] for one in tokens[1:-1]])  # (N, T)
    places = torch.cat([*order, tokens[-1]])
    list_of = Blocks(None, len(tokens[0]), there, len(tokens[-1]), 10**9, ())
    given = (query[:, :, places], key[:, :, places], value[:, :, places])
    found = attend_blocks(list_of, 0, *given, 0.0, entry["params"]["scaling"], masked_attention)  # (1, S', H, D)
    ends = torch.ones(len(tokens[0]), dtype=torch.bool), torch.ones(len(tokens[-1]), dtype=torch.bool)
    valid = found[0, torch.cat([ends[0], there.flatten(), ends[1]])]
    yield equal("out_valid", valid, entry["expected"]["out_valid"])
    yield equal(LOSS, valid.sum(), entry["loss"])
    number = torch.arange(blocks).repeat_interleave(length)
    mask = visible(number, real.flatten(), blocks - 1)
    at = torch.arange(blocks * length)
    seen = mask(0, 0, at[:, None], at[None]) & real.flatten()[:, None]
    yield equal("allowed", seen.long(), entry["expected"]["allowed"])


@golden("blockrank", "positions of a list", "permutation-invariant position ids", trains=False)
def positions(entry: Entry) -> Iterator[Compared]:
    real = torch.tensor(entry["inputs"]["attention_mask"])
    counts = real.sum(1).tolist()
    rows = torch.arange(counts[0] + max(counts[1:-1])).expand(len(counts) - 2, -1)  # (N, P + T)
    found = position_ids(flatten(rows, counts[0]), counts[-1], entry["params"]["query_offset"])[0]
    table = torch.zeros_like(real, dtype=torch.long)
    length = real.shape[1]
    table[0, length - counts[0] :] = found[: counts[0]]
    own = found[counts[0] : -counts[-1]].unflatten(0, (len(counts) - 2, -1))
    for number, count in enumerate(counts[1:-1]):
        table[number + 1, length - count :] = own[number, :count]
    table[-1, length - counts[-1] :] = found[-counts[-1] :]
    yield equal("position_ids", table, entry["expected"]["position_ids"])
    yield equal(LOSS, table.sum(), entry["loss"])
