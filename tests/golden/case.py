"""Cases: which code gives the values of losses.json, that were computed outside this repository, and what is compared.

A case is a generator. It is given an entry of the file and yields what it compares (`Compared`): a loss, the norms of
its gradients, other numbers on the way. `tests/golden/test_golden.py` runs each as a test, `python -m
tools.golden_table` as a row of docs/golden.md. An entry without a case has a reason in NOT_COVERED.

    @golden("dcl", "loss `dcl`")
    def dcl(entry):
        ...
        yield from check(entry, loss, z1=queries, z2=documents)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.data.labels import BatchLabels

Entry = dict[str, Any]
GOLDEN: dict[str, list[Entry]] = json.loads((Path(__file__).parent / "losses.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6
LOSS, GRADIENT = "loss", "gradient of "

# (slug, how the entry's name begins) -> why no case computes it
NOT_COVERED = {
    (
        "multicsr",
        "stage-3 masked loss as released",
    ): "counts masked cells as exp(0), ours as 0",
}


@dataclass(frozen=True)
class Compared:
    """A number, or a list of them."""

    what: str
    expected: list[float]
    got: list[float]
    tolerance: float = TOLERANCE

    @property
    def agrees(self) -> bool:
        pairs = zip(self.expected, self.got, strict=True)
        return all(abs(expected - got) <= self.tolerance for expected, got in pairs)  # False where one is no number


@dataclass(frozen=True)
class Case:
    """An entry of the file and the code that is to give its values."""

    slug: str
    entry: Entry
    by: str
    compute: Callable[[Entry], Iterator[Compared]]
    trains: bool

    def __str__(self) -> str:
        return f"{self.slug}: {self.entry['name']}, {self.by}"

    def compare(self) -> list[Compared]:
        """All of it. ValueError where a gradient that the file has is not compared, or where nothing is."""
        compared = list(self.compute(self.entry))
        found = {one.what.removeprefix(GRADIENT) for one in compared if one.what.startswith(GRADIENT)}
        if not compared or found != (set(self.entry.get("grad_norms", {})) if self.trains else set()):
            raise ValueError(f"{self}: gradients of {sorted(found)} are compared, not all of the file's")
        return compared


_CASES: list[Case] = []


def golden(slug: str, by: str | Callable[[Entry], str], *names: str, trains: bool = True) -> Callable[[Any], Any]:
    """Declares the function below it as the case of a slug's entries.

    Args:
        by: what computes it: a name in YAML, or a function.
        names: how the names of the entries begin; all of the slug's if none are given.
        trains: whether a gradient goes through it.
    """
    entries = [entry for entry in GOLDEN[slug] if not names or entry["name"].startswith(names)]
    assert entries, (slug, names)

    def declare(compute: Callable[[Entry], Iterator[Compared]]) -> Callable[[Entry], Iterator[Compared]]:
        _CASES.extend(Case(slug, entry, by if isinstance(by, str) else by(entry), compute, trains) for entry in entries)
        return compute

    return declare


def every_case() -> list[Case]:
    """In the order of the file."""
    from tests.golden import contrastive, fusion, mining, rerank, scores, single, vectors  # noqa: F401  (they declare)

    order = [id(entry) for entries in GOLDEN.values() for entry in entries]
    return sorted(_CASES, key=lambda case: order.index(id(case.entry)))


def uncovered() -> list[tuple[str, str, str | None]]:
    """(slug, name, why) of the entries without a case; None where nobody says why."""
    covered = {id(case.entry) for case in every_case()}
    return [
        (slug, entry["name"], reason(slug, entry["name"]))
        for slug, entries in GOLDEN.items()
        for entry in entries
        if id(entry) not in covered
    ]


def reason(slug: str, name: str) -> str | None:
    return next((why for (of, begin), why in NOT_COVERED.items() if of == slug and name.startswith(begin)), None)


# What cases are written with ------------------------------------------------------------------------------------------


def flat(values: Any) -> list[float]:
    """Numbers, lists of them, tensors -> one list."""
    return torch.as_tensor(values, dtype=torch.float64).detach().flatten().tolist()


def equal(what: str, got: Any, expected: Any, tolerance: float = TOLERANCE) -> Compared:
    return Compared(what, flat(expected), flat(got), tolerance)


def check(entry: Entry, loss: Tensor, **leaves: Tensor) -> Iterator[Compared]:
    """The loss, and the norms of its gradients at the leaves that the file has norms for."""
    yield equal(LOSS, loss, entry["loss"])
    if "grad_norms" in entry:
        loss.backward()
    for name, expected in entry.get("grad_norms", {}).items():
        gradient = leaves[name].grad
        yield equal(GRADIENT + name, math.nan if gradient is None else gradient.norm(), expected)


def tensor(values: Any, grad: bool = True) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def inputs(entry: Entry, *names: str) -> list[Tensor]:
    return [tensor(entry["inputs"][name]) for name in names]


def entry_of(slug: str, name: str) -> Entry:
    (found,) = (entry for entry in GOLDEN[slug] if entry["name"].startswith(name))
    return found


def on_sphere(*vectors: Tensor) -> list[Tensor]:
    """For the references that differentiate through the normalisation."""
    return [functional.normalize(one, dim=-1) for one in vectors]


def apart(count: int) -> Tensor:
    """No two pairs are the same."""
    return torch.eye(count, dtype=torch.bool)


def labels_of(queries: int, documents: int, group_size: int = 1, in_batch: bool = True) -> BatchLabels:
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
