"""Contrast with prototypes of the other side, found by k-means an episode at a time (ProtoCLIP).

L = 1/2 sum over sides s of mean_i CE( t_i, softmax_k(z_i . m_k / tau) ),   t the other side, the teacher
m_k = mean of the student's vectors of all pairs whose teacher is in cluster k          (prototype back translation)
t_i = softmax_k( c_{k(i)} . c_k / tau_t ), or k(i) itself;   c_k the teacher's centres, k(i) the one nearest to pair i

(arXiv 2206.10996; the loss, the clustering and its episodes are read in the released code.) z are the vectors of both
sides after a linear projection each, 128 numbers on the unit sphere. Back translation describes the teacher's clusters
in the student's own space, so that the two sides need not share one; without it m are the teacher's centres. There the
loss stands beside InfoNCE with weight 1, and so it should here: `[{type: infonce}, {type: proto_clip}]`. Before the
first episode is over there are no prototypes, and the loss is 0 (there, an epoch of InfoNCE alone).

An episode ends when `episode` pairs were trained on. There, an episode's pairs are encoded once more before they are
trained on, and keep the cluster of that pass; here their vectors are those of the training steps just made, and a pair
is in the cluster that is nearest to its vector now. That saves the pass (a third of the time there), needs nothing of
the trainer, and comes back from a checkpoint exactly; the price is that the first vectors of an episode are by as many
steps older. Not here: an external teacher (vectors of another model for each pair), and several starts of k-means.

All processes hold the same prototypes: vectors are gathered, and the first process's centres are sent to the others.
Projections and prototypes serve the training alone, and no pair is a negative of another. Cost: (N, K) floats a few
times; each episode 8 K E iterations operations a pair, and 2 x episode x head_size floats of memory.

When: two modalities share themes and no labels; beside InfoNCE, which aligns pairs, it groups them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmembed.clustering import kmeans, means, nearest
from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, drawn, generator_at
from mmembed.objectives.gather import from_first
from mmembed.objectives.soft_labels import soft_cross_entropy
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Positive


class ProtoCLIP(Aligned):
    """Each side has to tell which cluster of the other side its pair is in; clusters are made anew each episode.

    Args:
        embedding_size: of the vectors; the model gives it.
        prototypes: clusters of a side; 20,000 of episodes of 200,000 pairs in the released training.
        episode: pairs (of all processes) after which the clusters are made anew, and of which they are made.
        temperature: 0.07, CLIP's start; the released code learns it: {value: 0.07, learn: true}.
        teacher_temperature: of the targets, 0.01 in the released training; null for the nearest cluster alone.
        back_translation: describe the teacher's clusters by the student's own vectors.
        head_size: of the projections, 128 there.
        iterations: of k-means, 20 there.
        seed: of the first projections and of the first centres of k-means.
    """

    name = "proto_clip"
    keeps_vectors = True
    memory: Tensor
    seen: Tensor
    centres: Tensor
    targets: Tensor
    sizes: Tensor

    def __init__(
        self,
        embedding_size: int = 1,
        prototypes: Annotated[int, Field(ge=2)] = 256,
        episode: Positive = 4096,
        temperature: float | Mapping[str, Any] = 0.07,
        teacher_temperature: Annotated[float, Field(gt=0)] | None = 0.01,
        back_translation: bool = True,
        head_size: Positive = 128,
        iterations: Positive = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if episode < prototypes:
            raise ConfigError(
                f"objectives.proto_clip.prototypes: {prototypes} clusters of {episode} pairs; give fewer, or a longer "
                "episode"
            )
        self.idle_pairs = episode
        self.temperature, self.teacher_temperature = Temperature(temperature), teacher_temperature
        self.back_translation, self.iterations, self.seed = back_translation, iterations, seed
        self.heads = nn.Parameter(drawn(embedding_size**-0.5, seed, 2, embedding_size, head_size))
        self.register_buffer("memory", torch.zeros(2, episode, head_size))  # the last vectors of queries and positives
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))
        self.register_buffer("centres", torch.zeros(2, prototypes, head_size))  # of each side
        self.register_buffer("targets", torch.zeros(2, prototypes, head_size))  # each side, by the other's clusters
        self.register_buffer("sizes", torch.zeros(2, prototypes))  # pairs in the clusters of each side

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self._projected(pairs)  # (2, N, d)
        if not self.sizes.any():
            return 0 * vectors.sum(), {"prototypes": torch.zeros((), device=vectors.device)}
        losses, right = [], []
        for student, teacher in ((0, 1), (1, 0)):
            used = self.sizes[teacher] > 0
            centres = self.centres[teacher][used].to(vectors.dtype)  # (K, d)
            targets = self.targets[student][used].to(vectors.dtype)  # (K, d)
            labels = nearest(vectors[teacher].detach(), centres)[0].flatten()  # (N,)
            scores = vectors[student] @ targets.T * self.temperature.scale()  # (N, K)
            losses.append(against_prototypes(scores, centres, labels, self.teacher_temperature))
            right.append((scores.argmax(1) == labels).float().mean())
        found = (self.sizes > 0).sum(1).float().mean()
        return torch.stack(losses).mean(), {"prototype_accuracy": torch.stack(right).mean(), "prototypes": found}

    def news(self, pairs: Pairs) -> Tensor:
        return self._projected(pairs).detach()

    def keep(self, news: Tensor) -> None:
        size, start = self.memory.shape[1], int(self.seen)
        kept = min(news.shape[1], size)
        places = (start + torch.arange(news.shape[1], device=self.memory.device)[-kept:]) % size
        self.memory[:, places] = news[:, -kept:].to(self.memory.dtype)
        self.seen.add_(news.shape[1])
        if int(self.seen) // size > start // size:
            self._cluster()

    @torch.no_grad()
    def _cluster(self) -> None:
        """Ends an episode."""
        wide = torch.promote_types(self.memory.dtype, torch.float32)
        memory, generator = self.memory.to(wide), generator_at(self.seed, int(self.seen))
        count = self.centres.shape[1]
        centres = [kmeans(side, count, generator, self.iterations) for side in memory]
        members = [nearest(side, of)[0].flatten() for side, of in zip(memory, centres, strict=True)]  # (M,) each
        for student, teacher in ((0, 1), (1, 0)):
            translated, sizes = means(memory[student], members[teacher], count)
            self.centres[teacher].copy_(centres[teacher])
            self.targets[student].copy_(translated if self.back_translation else centres[teacher])
            self.sizes[teacher].copy_(sizes)
        for kept in (self.centres, self.targets, self.sizes):
            from_first(kept)

    def _projected(self, pairs: Pairs) -> Tensor:
        """(2, N, d) unit vectors."""
        sides = torch.stack([pairs.queries, pairs.positives])  # (2, N, E)
        return functional.normalize(sides @ self.heads[:, : sides.shape[2]].to(sides.dtype), dim=-1)


def against_prototypes(scores: Tensor, centres: Tensor, labels: Tensor, teacher_temperature: float | None) -> Tensor:
    """(N, K) scores of a student, (K, d) centres of the teacher, (N,) clusters -> scalar.

    >>> against_prototypes(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), None)  # log 2
    tensor(0.6931)
    """
    if teacher_temperature is None:
        return functional.cross_entropy(scores, labels)
    targets = (centres @ centres.T / teacher_temperature).softmax(1)  # (K, K)
    return soft_cross_entropy(scores, targets[labels])
