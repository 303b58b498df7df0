"""Multi-label cluster discrimination: the clusters that a sample is nearest to are its classes (MLCD).

L = 1/2 sum over sides of mean_i log(1 + sum_{k in neg} e^{z_i.c_k / tau}) + log(1 + sum_{k in pos} e^{-z_i.c_k / tau})

(arXiv 2407.17331, eq. 5; from memory of the paper, the training code is not released.) All data are clustered once,
with the vectors of any model, and each record carries the numbers of its nearest clusters as labels, "0" to "K - 1":

    python -m data_tools.cluster --source my.jsonl --clusters 1000 --labels 8 --output clustered.jsonl

(a million clusters and 8 labels in the paper). Class weights c are unit vectors, learned. A step compares the classes
of its batch and a random part of the others: each class is a negative of the samples that do not have it (Partial FC,
whose sampling is read in the authors' UNICOM code: `sampled` counts the positive classes). The draw follows from (seed,
step), the same in all processes and after a resume. The paper trains images alone; here both sides of a pair have the
record's labels. No pair is a negative of another, and any source will do. Cost: (N, sampled K) floats, and K x E
weights with their optimizer state.

When: there are no labels, the data are large and varied, and a good embedder is at hand to cluster them once.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, drawn, generator_at
from mmembed.objectives.label_paths import Classes, path_keys
from mmembed.objectives.prototypes import discrimination


class MLCD(Aligned):
    """Each sample belongs to several clusters of the data, its labels, and not to a random part of the others (MLCD).

    Args:
        embedding_size: of the vectors; the model gives it.
        clusters: how many there are; labels are their numbers.
        sampled: share of the classes that a step compares; 0.1 in the paper for a million.
        temperature: 1/64, the inverse of the scale that Partial FC is usually trained with; MLCD's was not read.
        seed: of the first class weights and of the draws.
    """

    name = "mlcd"
    takes_labels = True
    step: Tensor

    def __init__(
        self,
        embedding_size: int = 1,
        clusters: Annotated[int, Field(ge=2)] = 1000,
        sampled: Annotated[float, Field(gt=0, le=1)] = 0.1,
        temperature: Annotated[float, Field(gt=0)] = 1 / 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clusters, self.sampled, self.temperature, self.seed = clusters, sampled, temperature, seed
        self.weights = nn.Parameter(drawn(embedding_size**-0.5, seed, clusters, embedding_size))
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))
        self._classes = Classes((str(number),) for number in range(clusters))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = self._numbers(pairs)  # (N, L)
        wanted = torch.zeros(self.clusters + 1, dtype=torch.bool, device=numbers.device)
        wanted[numbers.flatten()] = True
        chosen = self._draw(wanted[: self.clusters])  # (M,)
        weights = self.weights[chosen, : pairs.queries.shape[1]].to(pairs.queries.dtype)
        centres = functional.normalize(weights, dim=-1)  # (M, E)
        positive = torch.zeros(len(numbers), len(chosen) + 1, dtype=torch.bool, device=numbers.device)
        positive = positive.scatter_(1, torch.searchsorted(chosen, numbers), True)[:, :-1]  # (N, M)
        sides = [discrimination(side @ centres.T / self.temperature, positive).mean() for side in pairs.unit]
        labels = positive.sum(1).float().mean()
        return torch.stack(sides).mean(), {"labels": labels, "classes": torch.tensor(float(len(chosen))).to(labels)}

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)

    def _numbers(self, pairs: Pairs) -> Tensor:
        """(N, L) clusters, K where a pair has fewer labels. Raises ConfigError on another label, or none."""
        exists = pairs.label_keys[..., 0] != 0
        numbers = self._classes.find(path_keys(pairs.label_keys))
        if (exists & (numbers < 0)).any():
            raise ConfigError(
                f"objective '{self.name}': a label of source '{pairs.source}' is no cluster; labels are the numbers "
                f"0 to {self.clusters - 1}, as data_tools.cluster writes them"
            )
        if not exists.any(1).all():
            raise ConfigError(
                f"objective '{self.name}': a record of source '{pairs.source}' has no label; cluster the whole source"
            )
        return numbers.masked_fill(~exists, self.clusters)

    def _draw(self, wanted: Tensor) -> Tensor:
        """(K,) bool, the classes of the batch -> numbers of these and of random others, in their order."""
        rank = torch.rand(self.clusters, generator=generator_at(self.seed, int(self.step))).to(wanted.device)
        count = max(round(self.sampled * self.clusters), int(wanted.sum()))
        return (rank + wanted).topk(count).indices.sort().values
