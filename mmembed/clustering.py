"""k-means, on the device and in the precision of the vectors.

Lloyd's iterations from K different rows drawn at random. A cluster that lost all rows takes the row that is farthest
from its centre. Rows are assigned in blocks, and sums of a cluster are matrix products: nothing of (M, K) is kept, and
two runs on one device give the same centres, which a scatter of atomic additions would not. Written here, and not taken
from faiss, because objectives call it in training: that would be a dependency of every run, in 32 bits and with its
own threads. Cost: 4 M K E operations an iteration, and a block of BLOCK distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**22  # distances of a block: 16 MB in float32


@torch.no_grad()
def kmeans(vectors: Tensor, count: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """(M, E) vectors -> (K, E) centres, K = `count`.

    Args:
        generator: of the CPU; draws the first centres.
        iterations: 20, of ProtoCLIP's released code; fewer where the centres stand still.

    Raises:
        ValueError: fewer vectors than centres.
    """
    if len(vectors) < count:
        raise ValueError(f"kmeans: {count} centres of {len(vectors)} vectors")
    chosen = torch.randperm(len(vectors), generator=generator)[:count]
    centres = vectors[chosen.to(vectors.device)]  # (K, E)
    for _ in range(iterations):
        moved = _moved(vectors, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


@torch.no_grad()
def nearest(vectors: Tensor, centres: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(M, E), (K, E) -> numbers of the `count` nearest centres and squared distances, (M, count) each, nearest first.

    >>> nearest(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]]))[0].flatten().tolist()
    [1, 0]
    """
    squares = centres.square().sum(1)
    found = [
        (squares - 2 * block @ centres.T).topk(count, dim=1, largest=False)
        for block in vectors.split(max(1, BLOCK // len(centres)))
    ]
    distances = torch.cat([one.values for one in found]) + vectors.square().sum(1, keepdim=True)
    return torch.cat([one.indices for one in found]), distances.clamp_min(0)


def means(vectors: Tensor, of: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(M, E) vectors, (M,) numbers of their clusters -> (K, E) means, 0 of an empty cluster, and (K,) sizes.

    >>> means(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), 2)
    (tensor([[0.],
            [2.]]), tensor([0., 2.]))
    """
    sums, sizes = vectors.new_zeros(count, vectors.shape[1]), vectors.new_zeros(count)
    rows = max(1, BLOCK // count)
    for block, numbers in zip(vectors.split(rows), of.split(rows), strict=True):
        member = torch.zeros(len(block), count, dtype=block.dtype, device=block.device)
        member.scatter_(1, numbers.unsqueeze(1), 1.0)  # (b, K)
        sums += member.T @ block
        sizes += member.sum(0)
    return sums / sizes.clamp_min(1).unsqueeze(1), sizes


def _moved(vectors: Tensor, centres: Tensor) -> Tensor:
    """One iteration."""
    of, distances = (one.flatten() for one in nearest(vectors, centres))
    moved, sizes = means(vectors, of, len(centres))
    empty = (sizes == 0).nonzero().flatten()
    if len(empty):
        moved[empty] = vectors[distances.topk(len(empty)).indices]
    return moved
