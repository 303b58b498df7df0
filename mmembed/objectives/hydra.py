"""Any two classes as a positive pair, in the subspace that a gate opens for them (Hydra, later SimLAP).

L = 1/|P| sum_{(i, j) in P} [ log( e^{s_ij} + sum_{k in neg_i} e^{s_ik} ) - s_ij ]
s_ij = cos( g_i * q_i, g_i * p_j ) / tau,   g_i = sigmoid( MLP( (e[y_i] + e[y'_i]) / 2 ) )

(arXiv 2410.18200; `SimLAP` of the authors' code, read there.) y_i is the class of pair i and y'_i a class that it shall
be like: that of another pair of the batch, drawn at random. P are the pairs (i, j) with j of class y'_i; negatives of i
are of neither class. The gate, from a learned vector e of each class and an MLP (rectifier, batch normalisation and
linear, twice), leaves of both sides the dimensions in which the two classes agree, so that two samples that have little
in common need not be alike as a whole.

Gate and class vectors serve the training alone. The released code gates a projection of two layers, this the embedding
itself; its anchors and candidates are one view of an image, here queries and positives, and pairs that share a content
are no negatives. Batch normalisation takes the batch of all processes and keeps no running means, which are of no use
without inference. The draw follows from (seed, step). There, a classifier on detached vectors is trained beside it to
watch it; it is left out. Cost: (N, N) floats a few times, in two products: |g * p|^2 and g^2 q . p need no (N, N, E).

When: classes are given and collapse is the worry: it draws something in common out of every pair of classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, drawn, generator_at
from mmembed.objectives.label_paths import Classes, single_path_keys
from mmembed.registry import Positive


class Hydra(Aligned):
    """Samples of any two classes attract in the dimensions that a learned gate leaves for the two (Hydra, SimLAP).

    Args:
        embedding_size: of the vectors; the model gives it.
        classes: the labels that occur, as a list or as a JSON file with one; for example `data/banking77/labels.json`.
        temperature: 0.1, of the released code.
        others: the class that a pair shall be like: of another pair of the batch (`arbitrary`, as released), its own
            (`identical`), or any other one (`distinct`, which a batch may have no sample of).
        label_size, gate_size: 512 and 1024 there, of a class vector and between the two layers.
        seed: of the first values and of the draws.
    """

    name = "hydra"
    takes_labels = True
    least_pairs = 2
    step: Tensor

    def __init__(
        self,
        embedding_size: int = 1,
        classes: str | Sequence[str] = (),
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        others: Literal["arbitrary", "identical", "distinct"] = "arbitrary",
        label_size: Positive = 512,
        gate_size: Positive = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = read_classes(classes)
        self.temperature, self.others, self.seed, self.count = temperature, others, seed, len(names)
        self._classes = Classes((name,) for name in names)
        self.class_vectors = nn.Parameter(drawn(1.0, seed, len(names), label_size))
        self.gates = nn.ParameterDict(
            {
                "scale_1": torch.ones(label_size),
                "shift_1": torch.zeros(label_size),
                "weight_1": drawn(label_size**-0.5, seed + 1, gate_size, label_size),
                "bias_1": torch.zeros(gate_size),
                "scale_2": torch.ones(gate_size),
                "shift_2": torch.zeros(gate_size),
                "weight_2": drawn(gate_size**-0.5, seed + 2, embedding_size, gate_size),
                "bias_2": torch.zeros(embedding_size),
            }
        )
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        own = self._numbers(pairs)  # (N,)
        wanted = self._wanted(own)
        gates = self.gate(own, wanted).to(pairs.queries.dtype)[:, : pairs.queries.shape[1]]  # (N, E)
        scores = gated_similarity(pairs.queries, pairs.positives, gates) / self.temperature
        positive = wanted[:, None] == own[None, :]  # (N, N)
        negative = (own[:, None] != own[None, :]) & ~positive & ~pairs.same
        metrics = {"open_gates": gates.mean().detach(), "positives": positive.sum(1).float().mean()}
        return multi_positive(scores, positive, negative), metrics

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)

    def gate(self, first: Tensor, second: Tensor) -> Tensor:
        """Numbers of classes (N,) twice -> (N, E) in (0, 1)."""
        hidden = (self.class_vectors[first] + self.class_vectors[second]) / 2  # (N, label_size)
        for layer in ("1", "2"):
            weight, bias, scale, shift = (self.gates[f"{one}_{layer}"] for one in ("weight", "bias", "scale", "shift"))
            normal = functional.batch_norm(hidden.relu(), None, None, scale, shift, training=True)
            hidden = functional.linear(normal, weight, bias)
        return hidden.sigmoid()

    def _wanted(self, own: Tensor) -> Tensor:
        """The class that each pair shall be like, (N,)."""
        generator = generator_at(self.seed, int(self.step))
        if self.others == "identical":
            return own
        if self.others == "arbitrary":
            return own[torch.randperm(len(own), generator=generator).to(own.device)]
        return (own + torch.randint(1, self.count, (len(own),), generator=generator).to(own.device)) % self.count

    def _numbers(self, pairs: Pairs) -> Tensor:
        """(N,) classes. Raises ConfigError where a pair has none, several, or one that is not listed."""
        numbers = self._classes.find(single_path_keys(pairs.label_keys, self.name, pairs.source))
        if (numbers < 0).any():
            raise ConfigError(
                f"objective '{self.name}': a label of source '{pairs.source}' is none of the {self.count} classes; "
                "list all of them in `classes`"
            )
        return numbers


def gated_similarity(queries: Tensor, positives: Tensor, gates: Tensor) -> Tensor:
    """(N, E), (M, E), (N, E) -> (N, M), the cosine of g_i q_i and g_i p_j.

    >>> gated_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[1.]])
    """
    weights = gates.square()  # (N, E)
    products = (weights * queries) @ positives.T  # (N, M)
    lengths = (weights * queries.square()).sum(1, keepdim=True) * (weights @ positives.square().T)  # (N, M)
    return products / lengths.clamp_min(torch.finfo(products.dtype).tiny).sqrt()


def multi_positive(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(N, M) scores, (N, M) bool twice -> scalar; each positive against the row's negatives, the mean over positives.

    >>> scores, positive = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> multi_positive(scores, positive, ~positive)  # log 2
    tensor(0.6931)
    """
    floor = torch.finfo(scores.dtype).min / 2
    away = scores.masked_fill(~negative, floor).logsumexp(1, keepdim=True)  # (N, 1)
    losses = torch.logaddexp(scores, away) - scores
    return losses.masked_fill(~positive, 0).sum() / positive.sum().clamp_min(1)


def read_classes(classes: str | Sequence[str]) -> list[str]:
    """The names of a list or of a JSON file. Raises ConfigError on fewer than two, or on one twice."""
    where = "objectives.hydra.classes"
    if isinstance(classes, str):
        try:
            names = json.loads(Path(classes).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {classes} cannot be read as a JSON list of labels ({error})") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{where}: {classes} is no JSON list of strings; write the labels of the data into one")
    else:
        names = list(classes)
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"{where}: {len(names)} labels, {len(set(names))} different ones; list two or more, each once"
        )
    return names
