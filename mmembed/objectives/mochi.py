"""InfoNCE against a queue and mixtures of its hardest vectors: negatives harder than any sample (MoCHi).

L = -mean_i log( e^{s_i+} / ( e^{s_i+} + sum_{k in queue} e^{s_ik} + sum_{h in mixtures} e^{s_ih} ) ),  s_ix = q_i.x/tau

h  = alpha n_a + (1 - alpha) n_b,  alpha ~ U(0, 1)    of two of the N queued vectors nearest to q_i
h' = beta q_i + (1 - beta) n_a,    beta ~ U(0, 1/2)   of the query and one of them

both on the unit sphere and without gradient (arXiv 2010.01028; from memory of the paper). Mixing begins when the queue
is full, where the paper waits for some epochs. Queued vectors that are a known positive of the query, or the query,
neither count nor mix. Numbers follow from (seed, step), the same in all processes and after a resume. There is no
momentum encoder here: the queue holds vectors of earlier weights, hence it is short. Cost: (N, size), (N, mixtures) and
(size, size) floats; a mixture's score follows from those of its parts.

When: batches are small and the negatives of a queue have become too easy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, generator_at
from mmembed.objectives.memory import Queue
from mmembed.objectives.temperature import Temperature
from mmembed.registry import Count, Positive


class MoCHi(Aligned):
    """InfoNCE whose negatives are the positives of past steps, and mixtures of the hardest of these (MoCHi).

    Args:
        embedding_size: of the vectors; the model gives it.
        temperature: 0.2, of the paper.
        size: vectors that the queue holds.
        hardest: queued vectors nearest to a query that mix; 1,024 of 65,536 in the paper, here of a shorter queue.
        mixtures, query_mixtures: of two of them, and of the query and one of them, a query; 1,024 and 128 in the paper.
        seed: of the draws.
    """

    name = "mochi"
    keeps_vectors = True
    contrasts = True

    def __init__(
        self,
        embedding_size: int = 1,
        temperature: float | Mapping[str, Any] = 0.2,
        size: Positive = 1024,
        hardest: Positive = 64,
        mixtures: Count = 64,
        query_mixtures: Count = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 < hardest <= size:
            raise ConfigError(f"objectives.mochi.hardest: {hardest} of a queue of {size}; give 2 or more of it")
        self.temperature, self.hardest, self.seed = Temperature(temperature), hardest, seed
        self.mixtures, self.query_mixtures = mixtures, query_mixtures
        self.queue = Queue(size, embedding_size)

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        queued, keys = self.queue.read(queries.shape[1])  # (M, E), (M, 2)
        queued, known = queued.to(queries.dtype), pairs.knows(keys)
        of_queue = queries @ queued.T  # (N, M)
        own = (queries * positives).sum(1, keepdim=True)  # (N, 1)
        scores, left_out = [own, of_queue], [torch.zeros_like(own, dtype=torch.bool), known]
        if len(keys) == len(self.queue.keys):
            hard, exists = hardest_of(of_queue.detach(), known, self.hardest)  # (N, hardest) each
            among = queued @ queued.T  # (M, M)
            itself = (queries * queries.detach()).sum(1, keepdim=True)  # (N, 1), of which the mixture is held constant
            for mixed, parts in self._mixed(of_queue, itself, among, hard, exists):
                scores.append(mixed)
                left_out.append(~parts)
        row = torch.cat(scores, 1) * self.temperature.scale()  # (N, 1 + M + X)
        loss = first_against_rest(row, torch.cat(left_out, 1)).mean()
        return loss, {"queued": torch.tensor(float(len(keys)), device=loss.device)}

    def _mixed(
        self, of_queue: Tensor, itself: Tensor, among: Tensor, hard: Tensor, exists: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Scores (N, X) of the mixtures of each kind, and which of them exist (N, X)."""
        generator, queries = generator_at(self.seed, int(self.queue.seen)), len(hard)

        def draw(count: int, most: float) -> tuple[Tensor, Tensor]:
            """Shares below `most`, and numbers of hard ones, (N, count) each."""
            shares = most * torch.rand(queries, count, generator=generator)
            numbers = torch.randint(self.hardest, (queries, count), generator=generator)
            return shares.to(of_queue), numbers.to(hard.device)

        alpha, a = draw(self.mixtures, 1.0)
        b = (a + torch.randint(1, self.hardest, a.shape, generator=generator).to(a.device)) % self.hardest  # another
        beta, c = draw(self.query_mixtures, 0.5)
        first, second, one = (hard.gather(1, numbers) for numbers in (a, b, c))  # of the queue
        of_first, of_second, of_one = (of_queue.gather(1, columns) for columns in (first, second, one))
        return [
            (
                mixed_scores(of_first, of_second, among[first, second], alpha),
                exists.gather(1, a) & exists.gather(1, b),
            ),
            (mixed_scores(itself, of_one, of_one.detach(), beta), exists.gather(1, c)),
        ]

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return pairs.unit[1].detach(), pairs.view_keys[:, 0]

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        self.queue.put(*news)


def mixed_scores(first: Tensor, second: Tensor, between: Tensor, share: Tensor | float) -> Tensor:
    """Products of a query with two unit vectors, and of these two -> its product with their mixture on the unit sphere.

    >>> mixed_scores(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), 0.5)  # a query that is the first
    tensor(0.7071)
    """
    length = share**2 + (1 - share) ** 2 + 2 * share * (1 - share) * between
    return (share * first + (1 - share) * second) / length.clamp_min(torch.finfo(length.dtype).eps).sqrt()


def hardest_of(scores: Tensor, known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, M) scores, (N, M) bool, which do not count -> (N, count) columns, the largest first, and whether they do."""
    found = scores.masked_fill(known, float("-inf")).topk(count, dim=1)
    return found.indices, found.values > float("-inf")


def first_against_rest(scores: Tensor, left_out: Tensor) -> Tensor:
    """(N, 1 + C) scores, the positive first, and which do not count -> (N,) losses."""
    floor = torch.finfo(scores.dtype).min / 2
    return scores.masked_fill(left_out, floor).logsumexp(1) - scores[:, 0]
