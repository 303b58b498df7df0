"""Wasserstein: the score distributions of a batch of queries against those of their grades (SyCL).

L = |mean_X - mean_Y|^2 + tr C_X + tr C_Y - 2 tr (C_X C_Y)^(1/2)

X = softmax(s) and Y = softmax(r / tau_label) over the valid candidates; their rows are taken as samples of two
Gaussians in R^C and L is the squared 2-Wasserstein distance of those (arXiv 2503.23239). With centred rows E the last
trace is the nuclear norm of E_Y E_X^T / (n - 1), a matrix of n queries: no C x C root. The released code takes
eigenvalues of the product, adds 1e-15 and takes the root, which has no gradient at equal or vanishing ones; here the
gradient is that of the nuclear norm, U V^T without the directions of singular value 0 (its subgradient of least norm).

What it is blind to: L compares statistics of the batch, so exchanging the scores of two queries leaves it unchanged.
Keep in-batch negatives on: without other queries' columns no two rows share one, and L is (1 + 1/n) mean_i
|x_i - y_i|^2, a loss of each query for itself. Keep batches large, and look at an evaluation by query. Cost: two
softmaxes over (n, C), two products (n, C) x (C, n) and a singular value decomposition of (n, n), about 20 n^3
operations; rows are coupled.

When: documents have several grades (synthetic passages of SyCL) and batches are large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmembed.errors import ConfigError
from mmembed.losses import Scores
from mmembed.losses.distributions import GradedLoss, graded
from mmembed.losses.rows import masked


class Wasserstein(GradedLoss):
    """List-wise on graded data: the squared 2-Wasserstein distance between scores and grades of the whole batch.

    Args:
        label_temperature: divides grades, not scores (1 in SyCL); see `kl_divergence`. SyCL trains unnormalised dot
            products with temperature 1; cosines need one of 0.05 or so.

    >>> values, valid = torch.tensor([[3.0, 2.0], [0.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    >>> loss = Wasserstein()(Scores(values, torch.tensor([[1.0, 0.0], [1.0, 2.0]]), valid))  # distributions are equal
    >>> [round(abs(value), 5) for value in loss.tolist()]
    [0.0, 0.0]
    """

    name = "wasserstein"
    couples_rows = True

    def forward(self, scores: Scores) -> Tensor:
        """Scores -> (Q,): the loss of the batch in each row with a positive, 0 in the others, which are left out.

        Raises ConfigError for scores that are not finite, which have no singular values.
        """
        targets, counted = graded(scores, self.label_temperature)  # (Q, C), (Q,)
        if not bool(counted.all()):
            scores = Scores(scores.values[counted], scores.relevance[counted], scores.valid[counted])
            targets = targets[counted]
        found = masked(scores.values, scores.valid).softmax(1)  # (n, C)
        if not len(found):
            return found.new_zeros(len(counted)) + found.sum()  # 0 that a backward may start from
        broken = int((~found.isfinite()).any(1).sum())
        if broken:
            raise ConfigError(
                f"losses.wasserstein: the scores of {broken} of {len(found)} queries are not finite, so the model's "
                "vectors or the temperature diverged; lower training.learning_rate, or train in bf16 instead of fp16"
            )
        distance = squared_distance(found, targets)
        return torch.where(counted, distance, distance.new_zeros(()))


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """(n, C), (n, C) -> the squared 2-Wasserstein distance of two Gaussians with these samples. y has no gradient."""
    mean_x, mean_y = x.mean(0), y.mean(0)  # (C,)
    centred_x, centred_y = x - mean_x, y - mean_y  # (n, C)
    traces = centred_x.square().sum() + centred_y.square().sum()
    cross: Tensor = _NuclearNorm.apply(centred_y @ centred_x.T)
    return (mean_x - mean_y).square().sum() + (traces - 2 * cross) / max(len(x) - 1, 1)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        left, singular, right = torch.linalg.svd(matrix)  # (n, n), (n,), (n, n)
        noise = singular.max() * len(matrix) * torch.finfo(matrix.dtype).eps  # numpy's and MATLAB's rank
        kept = (singular > noise).to(matrix.dtype)
        ctx.save_for_backward((left * kept) @ right)
        return singular.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (polar,) = ctx.saved_tensors
        return gradients[0] * polar
