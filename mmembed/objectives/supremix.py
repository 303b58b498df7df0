"""Contrast by the distance of numbers, with mixtures that lie between (SupReMix).

L = -mean_i mean_{p in P(i)} log( e^{s_ip} / ( sum_{r in P(i)} e^{s_ir} + sum_{n in N(i)} |y_i - y_n| e^{s_in} ) )

P(i) = { samples of the number of i } + { lambda z_a + (1 - lambda) z_b : lambda y_a + (1 - lambda) y_b = y_i }

N(i) = { samples of other numbers } + { mu z_i + (1 - mu) z_c : y_c != y_i },  mu ~ U(0, 1),  s_ij = z_i.z_j / tau

on the unit sphere (arXiv 2309.16633; no code is released: weights, renormalisation and the numbers of mixtures are our
reading). A mixture with the anchor is a negative harder than any sample, for its number is nearer; one of a sample
below and a sample above whose numbers average to the anchor's is a positive harder than any, for it says that the space
runs straight between them. One of each an anchor and step, drawn by (seed, step). Samples are the query and the
positive of each pair, which have the number in `labels` of their record; what shares a content with the anchor is no
negative. Cost: (2 N, 2 N) floats a few times.

When: records carry a number (an age, a price, a score) and vectors are to stand in its order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs, generator_at
from mmembed.registry import Above0


class SupReMix(Aligned):
    """Samples of one number attract, others repel by its distance, and so do mixtures in between (SupReMix).

    Args:
        temperature: 0.1; not known of the paper.
        seed: of the mixtures.
    """

    name = "supremix"
    takes_labels = True
    contrasts = True
    least_pairs = 2
    step: Tensor

    def __init__(self, temperature: Above0 = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.temperature, self.seed = temperature, seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        values = pairs.label_values
        if values is None or bool(values.isnan().any()):
            raise ConfigError(
                f"objective '{self.name}': source '{pairs.source}' has records whose first label is no number; give "
                'each one, for example labels: ["3.5"]'
            )
        vectors, numbers = torch.cat(pairs.unit), values.repeat(2)  # (M, E), (M,)
        draws = torch.rand(4, len(vectors), len(vectors), generator=generator_at(self.seed, int(self.step)))
        same = pairs.same.repeat(2, 2)  # (M, M)
        scores, weights, positive = regression_scores(vectors, numbers, same, draws.to(vectors))
        loss = regression_contrast(scores / self.temperature, weights, positive)
        return loss.mean(), {"mixed_positives": positive[:, -1].float().mean()}

    def news(self, pairs: Pairs) -> Tensor:
        return self.step + 1

    def keep(self, news: Tensor) -> None:
        self.step.copy_(news)


def regression_scores(vectors: Tensor, numbers: Tensor, same: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities of each sample with the others, with its negative mixture and with its positive one.

    Args:
        vectors: (M, E) unit vectors. numbers: (M,) their labels. same: (M, M) bool, which share a content.
        draws: (4, M, M) numbers in (0, 1): by the first three the parts of mixtures are chosen, the diagonal of the
            last is the anchor's share.

    Returns:
        Similarities (M, M + 2), weights of negatives (M, M + 2), which are positives (M, M + 2); what is neither has a
        weight of 0.
    """
    count = len(vectors)
    itself = torch.eye(count, dtype=torch.bool, device=vectors.device)
    distances = (numbers[:, None] - numbers[None, :]).abs()  # (M, M)
    alike, distances = (distances == 0) & ~itself, distances.masked_fill(same, 0)
    scores = vectors @ vectors.T  # (M, M)
    row, squares = torch.arange(count, device=vectors.device), scores.diagonal()

    def chosen(among: Tensor, draw: Tensor) -> Tensor:
        return draw.masked_fill(~among, -1).argmax(1)  # (M,)

    def mixed(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
        """(M,), of each sample with share z_one + (1 - share) z_other."""
        rest = 1 - share
        lengths = share**2 * squares[one] + rest**2 * squares[other] + 2 * share * rest * scores[one, other]
        products = share * scores[row, one] + rest * scores[row, other]
        return products / lengths.clamp_min(torch.finfo(lengths.dtype).eps).sqrt()

    other, share = chosen(distances > 0, draws[0]), draws[3].diagonal()  # (M,) each
    below, above = numbers[None, :] < numbers[:, None], numbers[None, :] > numbers[:, None]  # (M, M)
    low, high = chosen(below & ~same, draws[1]), chosen(above & ~same, draws[2])
    exists = (below & ~same).any(1) & (above & ~same).any(1)  # (M,)
    part = (numbers[high] - numbers) / (numbers[high] - numbers[low]).masked_fill(~exists, 1)
    negative, positive = mixed(row, other, share), mixed(low, high, part.masked_fill(~exists, 1))
    none = torch.zeros_like(exists)
    return (
        torch.cat([scores, negative[:, None], positive[:, None]], 1),
        torch.cat([distances, ((1 - share) * distances[row, other])[:, None], torch.zeros_like(share)[:, None]], 1),
        torch.cat([alike, none[:, None], exists[:, None]], 1),
    )


def regression_contrast(scores: Tensor, weights: Tensor, positive: Tensor) -> Tensor:
    """Scores, weights of the negatives, which are positives, (M, C) each -> (M,) losses; 0 without a positive.

    >>> scores, positive = torch.zeros(1, 3), torch.tensor([[True, False, False]])
    >>> regression_contrast(scores, torch.tensor([[0.0, 1.0, 2.0]]), positive)  # log(1 + 1 + 2)
    tensor([1.3863])
    """
    floor = torch.finfo(scores.dtype).min / 2
    weighted = scores + torch.where(positive, 1.0, weights).clamp_min(torch.finfo(scores.dtype).tiny).log()
    total = weighted.masked_fill(~positive & (weights <= 0), floor).logsumexp(1)  # (M,)
    of_positives = (scores * positive).sum(1) / positive.sum(1).clamp_min(1)
    return (total - of_positives) * positive.any(1)
