"""A vector and its own parts: the mean of an input's vectors against each of them (the local terms of TCL).

L = -mean_i mean_l log( e^{g_i.z_il / tau} / ( e^{g_i.z_il / tau} + sum_{j != i, m} e^{g_i.z_jm / tau} ) )

for queries and for positives, averaged (arXiv 2202.10401): z_il are the unit vectors of an input (pooling
`multi_vector`), g_i the unit vector of their mean. Vectors of other inputs of the same side are negatives, those of the
same content are not. The paper pools patches before this term and takes g from the model's own global token; here g is
the mean. Its other four terms are `tcl`, which compares the same means under this pooling: the mean of all six is
`[{type: global_local, weight: 0.333}, {type: tcl, weight: 0.667}]`. Cost: N x N T products a side, in blocks of rows
that are made again in the backward.

When: pooling is `multi_vector` and the parts of an input should agree with the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import Objective, View
from mmembed.objectives.aligned import alone, check_in_batch, group_documents, mean_vector
from mmembed.objectives.gather import gather_counts, gather_embeddings, gather_rows, world
from mmembed.objectives.similarity import maxsim
from mmembed.objectives.temperature import Temperature

if TYPE_CHECKING:
    from mmembed.data.streaming import Source

PRODUCTS = 2**24  # alive at once: 64 MB in float32


@dataclass(frozen=True)
class Sides:
    """N queries of all processes and their first positives, several vectors each.

    keys: (2, N) int64, hashes of the contents of either side.
    local: rows of this process.
    """

    queries: Embeddings
    positives: Embeddings
    keys: Tensor
    local: slice


class GlobalLocal(Objective):
    """Each vector of an input belongs to the input's mean, not to that of another (pooling `multi_vector`).

    Args:
        temperature: 0.07, of the paper.
    """

    name = "global_local"
    many_vectors = True
    takes_negatives = False

    def __init__(self, temperature: float | Mapping[str, Any] = 0.07) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)

    @property
    def across_processes(self) -> bool:
        return True

    def check(self, sources: Sequence[Source]) -> None:
        check_in_batch(self.name, sources)

    def similarity_of(self, queries: Embeddings, documents: Embeddings) -> Tensor:
        return maxsim(queries, documents)

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Sides:
        """Raises ConfigError for one vector an input, and where a source forbids in-batch negatives."""
        if queries.mask is None:
            raise ConfigError("objective 'global_local' compares an input with its vectors: use pooling 'multi_vector'")
        if not labels.in_batch:
            raise ConfigError(alone(self.name, labels.source))
        firsts = {query: group[0][0] for query, group in enumerate(group_documents(labels)) if group[0]}
        rows = torch.tensor(list(firsts), dtype=torch.long, device=labels.owner.device)  # (n,)
        chosen = torch.tensor(list(firsts.values()), dtype=torch.long, device=labels.owner.device)  # (n,)
        counts = gather_counts(len(rows), labels.owner.device)
        start = sum(counts[: world()[0]]) if len(counts) > 1 else 0
        keys = torch.stack([labels.query_keys[rows], labels.document_keys[chosen, 0]], dim=1)  # (n, 2)
        return Sides(
            gather_embeddings(queries.rows(rows), counts),
            gather_embeddings(documents.rows(chosen), counts),
            gather_rows(keys, counts).T,
            slice(start, start + len(rows)),
        )

    def truncate(self, gathered: Sides, dims: slice) -> Sides:
        queries, positives = gathered.queries.truncate(dims), gathered.positives.truncate(dims)
        return replace(gathered, queries=queries, positives=positives)

    def compare(self, gathered: Sides) -> tuple[Tensor, dict[str, Tensor]]:
        losses = []
        with torch.autocast(gathered.keys.device.type, enabled=False):
            for side, keys in zip((gathered.queries, gathered.positives), gathered.keys, strict=True):
                assert side.mask is not None, "gather asked for several vectors"
                vectors = functional.normalize(side.vectors, dim=-1)  # (N, T, E)
                means = mean_vector(side).vectors  # (N, E)
                same = keys[:, None] == keys
                losses.append(of_parts(means, vectors, side.mask, same, self.temperature.scale()))
        return torch.stack(losses).mean(), {"queries": losses[0].detach(), "positives": losses[1].detach()}

    def view(self, gathered: Sides) -> View:
        """Local queries against all positives."""
        own = gathered.queries.rows(torch.arange(len(gathered.keys[0]), device=gathered.keys.device)[gathered.local])
        others = gathered.positives
        index = torch.arange(gathered.keys.shape[1], device=gathered.keys.device)
        relevance = (index[gathered.local][:, None] == index).float()  # (Q, N)
        same = (gathered.keys[:, gathered.local][:, :, None] == gathered.keys[:, None, :]).any(0)
        return View(own, others, self.similarity_of(own, others), relevance, (relevance > 0) | ~same, {}, None)


def of_parts(means: Tensor, vectors: Tensor, mask: Tensor, same: Tensor, scale: Tensor | float) -> Tensor:
    """Unit vectors (N, E) and (N, T, E), (N, T) bool, (N, N) bool -> scalar.

    >>> of_parts(torch.eye(2), torch.eye(2).unsqueeze(1), torch.ones(2, 1).bool(), torch.eye(2).bool(), 1.0)
    tensor(0.3133)
    """
    scale = torch.as_tensor(scale, dtype=means.dtype, device=means.device)
    rows = max(1, PRODUCTS // max(1, mask.numel()))
    negatives = [
        checkpoint(_negatives, block, vectors, mask, alike, scale, use_reentrant=False, preserve_rng_state=False)
        for block, alike in zip(means.split(rows), same.split(rows), strict=True)
    ]
    own = torch.einsum("ne,nte->nt", means, vectors) * scale  # (N, T)
    losses = functional.softplus(torch.cat(negatives)[:, None] - own) * mask  # (N, T)
    return (losses.sum(1) / mask.sum(1).clamp_min(1)).mean()


def _negatives(means: Tensor, vectors: Tensor, mask: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """log sum exp over the vectors of other inputs, (n,); very low where there are none."""
    products = torch.einsum("ne,mte->nmt", means, vectors) * scale  # (n, N, T)
    counted = ~same[:, :, None] & mask  # (n, N, T)
    floor = torch.finfo(products.dtype).min / 2
    return products.masked_fill(~counted, floor).flatten(1).logsumexp(1)
