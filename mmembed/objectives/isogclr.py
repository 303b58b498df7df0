"""A temperature and a running normaliser for every pair: robust global contrast in small batches (iSogCLR).

With h_ij = s_ij - s_ii over the n_i valid negatives of row i, in both directions (arXiv 2305.11965, bimodal form):

u_i <- (1 - gamma) u_i + gamma mean_j e^{h_ij / tau_i}      (the mean itself at the first visit)
L   =  mean_i sum_j w_ij h_ij (and over directions),   w_ij = e^{h_ij / tau_i} / u_i held constant
tau_i <- clip( tau_i - eta m_i ),  m_i <- (1 - beta) m_i + beta g_i,  g_i = log u_i + rho - mean_j w_ij h_ij / tau_i

u estimates the sum over all data, not over the batch, so a small batch does not bias the gradient. L is a surrogate
whose gradient is meant: its value may be negative, and may rise while training works. Sums over j are not divided by
n_i, as in LibAUC's bimodal loss; log u is kept, for e^{h / tau} overflows at low temperatures. The authors' first
repository builds a mask of negatives and does not use it; here it counts.

The memory (log u, tau, m of both sides) is kept by the content of the query: six numbers a pair, gathered, so that all
processes hold the same, saved and resumed. Data whose queries never come back gain nothing. Cost: (N, N) floats four
times.

When: batches are small and data uneven: frequent meanings want a higher temperature than rare ones. Needs several
epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.memory import KeyedRows
from mmembed.registry import Above0, Weight

CLIP = 5.0  # of the gradient of a temperature, in the authors' code
OF_A_SIZE = 1_000_003  # sets the memories of different truncations apart


@dataclass(frozen=True)
class State:
    """Of one direction, (N,) each; `known` is false at the first visit."""

    log_u: Tensor
    tau: Tensor
    momentum: Tensor
    known: Tensor


class ISogCLR(Aligned):
    """Every pair has its own temperature, learned, and a running estimate of its normaliser over all data.

    Args:
        temperature: every pair's first one; 0.01 for two modalities (0.1 for one), in the authors' code.
        rho: how far a pair's weights may be from uniform; 6 to 8 there (0.3 to 0.4 for one modality).
        gamma: weight of the batch in the running estimate.
        eta: step of the temperatures.
        beta: weight of a step in the running mean of their gradients.
        lowest, highest: bounds of the temperatures.
    """

    name = "isogclr"
    least_pairs = 2
    contrasts = True

    def __init__(
        self,
        temperature: Above0 = 0.01,
        rho: Weight = 6.0,
        gamma: Annotated[float, Field(gt=0, le=1)] = 0.8,
        eta: Above0 = 0.03,
        beta: Annotated[float, Field(gt=0, le=1)] = 0.9,
        lowest: Above0 = 0.005,
        highest: Above0 = 1.0,
    ) -> None:
        super().__init__()
        if not lowest <= temperature <= highest:
            raise ConfigError(
                f"objectives.isogclr.temperature: {temperature} is not between lowest {lowest} and highest {highest}"
            )
        self.temperature, self.rho, self.gamma = temperature, rho, gamma
        self.eta, self.beta, self.lowest, self.highest = eta, beta, lowest, highest
        self.memory = KeyedRows(6)

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        queries, positives = pairs.unit
        of_queries, of_positives = self.recall(pairs)
        scores = queries @ positives.T  # (N, N)
        forward, _, _ = robust(scores, pairs.same, of_queries, self.gamma)
        backward, _, _ = robust(scores.T, pairs.same.T, of_positives, self.gamma)
        known = of_queries.known.float().mean()
        return (forward + backward).mean() / 2, {"temperature": of_queries.tau.mean(), "seen_before": known}

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        queries, positives = pairs.unit
        scores = queries @ positives.T
        rows = []
        for state, of, same in zip(self.recall(pairs), (scores, scores.T), (pairs.same, pairs.same.T), strict=True):
            _, log_u, gradient = robust(of, same, state, self.gamma)
            momentum = (1 - self.beta) * state.momentum + self.beta * (gradient + self.rho)
            tau = (state.tau - self.eta * momentum.clamp(-CLIP, CLIP)).clamp(self.lowest, self.highest)
            rows += [log_u, tau, momentum]
        alone = (pairs.same.sum(1) == len(scores)).unsqueeze(1)  # nothing to learn from
        before = torch.stack([part for state in self.recall(pairs) for part in _parts(state)], dim=1)
        return self._keys(pairs), torch.where(alone, before, torch.stack(rows, dim=1))

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        self.memory.put(*news)

    def _keys(self, pairs: Pairs) -> Tensor:
        return pairs.query_keys + pairs.queries.shape[1] * OF_A_SIZE

    def recall(self, pairs: Pairs) -> tuple[State, State]:
        """Of queries and of positives."""
        rows, known = self.memory.find(self._keys(pairs))  # (N, 6), (N,)
        rows = rows.to(pairs.queries.dtype)
        of_queries, of_positives = (
            State(
                part[:, 0],
                torch.where(known, part[:, 1], self.temperature),
                part[:, 2],
                known,
            )
            for part in (rows[:, :3], rows[:, 3:])
        )
        return of_queries, of_positives


def robust(scores: Tensor, same: Tensor, state: State, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, N) scores, positives on the diagonal -> surrogates, new log u, gradients of tau without rho; (N,) each.

    Args:
        same: (N, N) bool, no negatives; true on the diagonal.

    >>> state = State(torch.zeros(2), torch.ones(2), torch.zeros(2), torch.zeros(2).bool())
    >>> [part.tolist() for part in robust(torch.eye(2), torch.eye(2).bool(), state, 0.8)]
    [[-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]]
    """
    floor = torch.finfo(scores.dtype).min / 2
    differences = (scores - scores.diagonal()[:, None]).masked_fill(same, 0)  # (N, N)
    exponents = (differences.detach() / state.tau[:, None]).masked_fill(same, floor)
    count = (~same).sum(1).clamp_min(1).to(scores.dtype)  # (N,)
    log_mean = exponents.logsumexp(1) - count.log()
    running = torch.logaddexp(state.log_u + math.log(max(1 - gamma, 1e-38)), log_mean + math.log(gamma))
    log_u = torch.where(state.known, running, log_mean)
    weights = (exponents - log_u[:, None]).exp().masked_fill(same, 0)  # (N, N)
    gradient = log_u - (weights * differences.detach()).sum(1) / state.tau / count
    return (weights * differences).sum(1), log_u, gradient


def _parts(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.log_u, state.tau, state.momentum
