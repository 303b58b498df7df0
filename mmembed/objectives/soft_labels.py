"""Soft contrastive labels: how alike the words of two labels are says how near their samples should be (Dialog2Flow).

L = mean_i - sum_j softmax_j( cos(l_i, l_j) / tau_l ) log softmax_j( cos(q_i, p_j) / tau )

(arXiv 2410.18481; `LabeledContrastiveLoss` of the released code with soft labels, read there.) l_i is the vector that a
fixed embedder gives the words of the label of pair i, q and p are queries and positives: "inform price" and "inform
area" are pushed apart less than "greet" and "inform area". Where two pairs share a content their labels count as equal
(ours). `symmetric` averages with the direction from positives to queries.

Vectors of labels are made once, by any embedder that is to be trusted with them, and read from a folder:

    mmembed encode labels.jsonl --output labels.enc      # lines {"id": the label, "text": its words}

An `id` is the label as in the records; of a label with levels, their names with "/" between them. The released code
takes one-hot targets where labels are numbers; here their words are what the file says. Cost: (N, N) floats twice.

When: labels have telling names, and some of them mean nearly the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.label_paths import Classes, single_path_keys
from mmembed.search.vectors import open_vectors

Above0 = Annotated[float, Field(gt=0)]
ITEMS = "items.jsonl"  # of a folder that `mmembed encode` writes


class SoftLabels(Aligned):
    """The similarity of labels in words, by a fixed embedder, is the target of the contrast (Dialog2Flow).

    Args:
        vectors: folder that `mmembed encode` wrote, with one entry for each label.
        temperature: 0.05, of the released training.
        label_temperature: 0.25 there; smaller targets are harder.
        symmetric: average with the contrast of each positive with all queries (false there).
    """

    name = "soft_labels"
    takes_labels = True
    least_pairs = 2

    def __init__(
        self,
        vectors: str | None = None,
        temperature: Above0 = 0.05,
        label_temperature: Above0 = 0.25,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if vectors is None:
            raise ConfigError(
                "objectives.soft_labels.vectors: missing; give the folder that `mmembed encode` wrote of your labels"
            )
        self.folder, self.temperature, self.label_temperature = vectors, temperature, label_temperature
        self.symmetric = symmetric
        names, table = read_label_vectors(Path(vectors))
        self._table = functional.normalize(table, dim=-1)  # (K, W)
        # a name with "/" in it may be a path, or just that name: both are found
        self._whole, self._paths = Classes((name,) for name in names), Classes(tuple(n.split("/")) for n in names)

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        table = self._table.to(pairs.queries)
        vectors = table[self._numbers(pairs)]  # (N, W)
        alike = (vectors @ vectors.T).masked_fill(pairs.same, 1.0)  # (N, N)
        targets = (alike / self.label_temperature).softmax(1)
        queries, positives = pairs.unit
        scores = queries @ positives.T / self.temperature
        loss = soft_cross_entropy(scores, targets)
        if self.symmetric:
            loss = (loss + soft_cross_entropy(scores.T, targets)) / 2
        entropy = torch.special.entr(targets).sum(1).mean() / torch.log(torch.tensor(float(len(targets))))
        return loss, {"target_entropy": entropy}

    def _numbers(self, pairs: Pairs) -> Tensor:
        """(N,) rows of the table. Raises ConfigError where a pair has no label, several, or an unknown one."""
        keys = single_path_keys(pairs.label_keys, self.name, pairs.source)
        whole, paths = self._whole.find(keys), self._paths.find(keys)
        numbers = torch.where(whole >= 0, whole, paths)
        if (numbers < 0).any():
            raise ConfigError(
                f"objective '{self.name}': a label of source '{pairs.source}' is none of the {len(self._table)} ids in "
                f"{self.folder}; encode all labels, each with its name as id"
            )
        return numbers


def soft_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """(N, C) scores and shares -> scalar.

    >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))  # log 2
    tensor(0.6931)
    """
    return -(targets * scores.log_softmax(1)).sum(1).mean()


def read_label_vectors(folder: Path) -> tuple[list[str], Tensor]:
    """-> K names, (K, W) float32. Raises ConfigError where it is no such folder, or holds a name twice."""
    where = "objectives.soft_labels.vectors"
    try:
        lines = (folder / ITEMS).read_text(encoding="utf-8").splitlines()
        rows = open_vectors(folder)[:]
        names = [str(json.loads(line)["id"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: {folder} cannot be read as a folder of `mmembed encode` with vectors and {ITEMS} ({error})"
        ) from None
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != len(names) or not names:
        raise ConfigError(
            f"{where}: {folder} holds {rows.dtype} vectors of shape {rows.shape} and {len(names)} names; encode the "
            "labels in float32 or float16, one vector a label"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: {folder} holds the label '{twice}' twice; remove one of them")
    return names, torch.from_numpy(rows.astype(np.float32))
