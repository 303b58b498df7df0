"""SupCon with degrees: samples attract as far as their labels agree in the tree of labels (SPACE-2).

L = mean_i - 1 / (sum_j f_ij) sum_{j != i} f_ij log( e^{z_i.z_j / tau} / sum_{a != i} e^{z_i.z_a / tau} )

f_ij in [0, 1] is the agreement of label paths (`label_paths.tree_similarities`): in one view of the tree it is the
Jaccard index of two sets, and with domain, intent, slot and value there are ten views (arXiv 2209.06638, the paper's
multi-view score; the score and its call are read in the released code, the loss is its SupCon with f as mask). Without
`subspace_size` f is the mean over the views in which either sample has a name, as `hierarchical_set_score` there. With
it, each view has a projection and a loss of its own, z = tanh(W_v x + b_v) normalised, and L is their mean; the
released training does that, with 768 dimensions each, and the projections serve it alone.

The two views of a sample are a query and its positive, f = 1 between them and between pairs of one content. A record
without labels agrees with nothing else: among labelled ones it is only pushed. The released code lower-cases names;
here the data decides. Cost: (2 N, 2 N) floats (V times with subspaces), and (N, distinct names) for each view.

When: labels have levels, or several belong to a sample, and being near in the tree should mean being near.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, drawn
from mmembed.objectives.label_paths import tree_similarities
from mmembed.objectives.supcon import supcon
from mmembed.registry import Positive


class TreeSupCon(Aligned):
    """Queries and positives attract those whose label paths agree with theirs, by how much they do (SPACE-2).

    Args:
        embedding_size: of the vectors; the model gives it.
        temperature: 0.07, of the released training.
        levels: depth of the deepest label; 4 in the paper (domain, intent, slot, value).
        subspace_size: dimensions of a projection for each view of the tree; without it the vectors themselves are
            compared.
        seed: of the first projections.
    """

    name = "tree_supcon"
    least_pairs = 2
    takes_labels = True
    projections: nn.Parameter | None

    def __init__(
        self,
        embedding_size: int = 1,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        levels: Positive = 4,
        subspace_size: Positive | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.levels = temperature, levels
        self.register_parameter("projections", None)
        if subspace_size is not None:
            views = levels * (levels + 1) // 2
            self.projections = nn.Parameter(drawn(embedding_size**-0.5, seed, views, embedding_size, subspace_size))
            self.biases = nn.Parameter(torch.zeros(views, 1, subspace_size))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        labels = pairs.label_keys
        if labels.shape[2] > self.levels:
            raise ConfigError(
                f"objective '{self.name}': a label of source '{pairs.source}' has {labels.shape[2]} levels, levels is "
                f"{self.levels}; raise it, or shorten the label"
            )
        labels = functional.pad(labels, (0, self.levels - labels.shape[2]))
        agreements, present = tree_similarities(labels)  # (V, N, N) each
        agreements = agreements.to(pairs.queries.dtype)
        mean = (agreements.sum(0) / present.sum(0).clamp_min(1)).masked_fill(pairs.same, 1.0)  # (N, N)
        views = torch.stack([pairs.queries, pairs.positives])  # (2, N, E)
        others = (mean.sum() - len(mean)) / max(len(mean) * (len(mean) - 1), 1)
        metrics = {"label_agreement": others.detach()}
        if self.projections is None:
            return self._supcon(views, mean), metrics
        size = views.shape[2]  # a prefix of the embedding under matryoshka
        terms = [
            self._supcon(torch.tanh(views @ weight[:size] + bias), of_view.masked_fill(pairs.same, 1.0))
            for weight, bias, of_view in zip(
                self.projections.to(views.dtype), self.biases.to(views.dtype), agreements, strict=True
            )
        ]
        return torch.stack(terms).mean(), metrics

    def _supcon(self, views: Tensor, weights: Tensor) -> Tensor:
        return supcon(functional.normalize(views, dim=-1), weights, self.temperature, self.temperature)
