"""Cases of fused weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmembed.fusion.rules import RULES
from mmembed.fusion.soup import select
from tests.golden.case import LOSS, Compared, Entry, equal, golden


def fused(rule: object, name: str, base: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    built = RULES.build(rule)
    weights = built.weights(name, base, tensors)
    return built.combine(base, tensors, weights), weights


@golden("codiemb", "fusion `delta_guided`", "delta-guided fusion", trains=False)
def delta_guided(entry: Entry) -> Iterator[Compared]:
    """A reading of the abstract, not the paper's formula."""
    base, *tensors = (torch.tensor(one) for one in (entry["inputs"]["theta0"], *entry["inputs"]["thetas"]))
    tensor, weights = fused("delta_guided", "theta", base, tensors)
    yield equal(LOSS, tensor.sum(), entry["loss"])
    yield equal("weights", weights, entry["expected"]["weights"])
    yield equal("fused", tensor, entry["expected"]["fused"])


@golden("model-soups", "fusion `uniform`", "uniform soup", trains=False)
def uniform(entry: Entry) -> Iterator[Compared]:
    tensor, _ = fused("uniform", "theta", None, [torch.tensor(one) for one in entry["inputs"]["thetas"]])
    yield equal(LOSS, tensor.sum(), entry["loss"])
    yield equal("fused", tensor, entry["expected"]["uniform"])


@golden("model-soups", "`mmembed.fusion.soup.select`", "greedy soup", trains=False)
def greedy(entry: Entry) -> Iterator[Compared]:
    """The held-out score is that of the file: .80 - .01 sum |theta - (1.5, 1.5, -.5)|."""
    thetas = [torch.tensor(one, dtype=torch.float64) for one in entry["inputs"]["thetas"]]
    best = torch.tensor([1.5, 1.5, -0.5], dtype=torch.float64)

    def score(members: Sequence[int]) -> float:
        tensor, _ = fused("uniform", "theta", None, [thetas[member] for member in members])
        return 0.8 - 0.01 * float((tensor - best).abs().sum())

    found = select(len(thetas), score)
    yield equal(LOSS, found.score, entry["loss"])
    yield equal("order", found.order, entry["expected"]["order"])
    yield equal("soup", found.chosen, entry["expected"]["soup"])


@golden("atlas", "fusion `atlas`", trains=False)
def atlas(entry: Entry) -> Iterator[Compared]:
    coefficients = torch.tensor(entry["params"]["coefficients"])  # (K, blocks)
    starts = [torch.tensor(one) for one in entry["inputs"]["theta0"]]
    rule = {"type": "atlas", "coefficients": {str(block): one.tolist() for block, one in enumerate(coefficients.T)}}
    blocks = []
    for block, start in enumerate(starts):
        tensors = [start + torch.tensor(vectors[block]) for vectors in entry["inputs"]["task_vectors"]]
        blocks.append(fused(rule, str(block), start, tensors)[0])
        yield equal(f"block {block}", blocks[-1], entry["expected"]["theta"][block])
    yield equal(LOSS, sum(one.sum() for one in blocks), entry["loss"])
