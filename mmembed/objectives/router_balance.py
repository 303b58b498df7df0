"""The auxiliary loss that keeps a mixture's experts in use (Switch Transformers, arXiv 2101.03961, equation 4).

L = E sum_i f_i P_i        f_i: tokens that chose expert i, P_i: its mean probability, both over tokens and layers

It is E times k / E where all E experts get as many tokens, k of them each, and larger where few get most. f has no
gradient; P has. With several choices a token, and over all layers at once, it is what transformers adds to its language
models (`load_balancing_loss_func`, weight `router_aux_loss_coef`: 0.001 in Qwen3-MoE, 0.02 in Mixtral).

A mean over the tokens of a batch is no sum over its chunks: f of one chunk is not that of the batch. So the model gives
each input's sums of probabilities and choices, as it gives vectors, and this compares those of the whole global batch:
the gradient does not depend on chunks or processes. Instructions and prompts count, padding does not; an input that the
batch holds twice counts twice. Cost: one reduction of E numbers over processes.

When: as a term of weight 0.001 to 0.02 where routers are trained (all of the backbone, or `adapter.router`). With
frozen routers it moves what they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import MmembedError
from mmembed.objectives import Objective
from mmembed.objectives.gather import world


@dataclass(frozen=True)
class Used:
    """Probabilities of this process's tokens, and of all processes': probabilities and choices; (E,) each."""

    own: Tensor
    probabilities: Tensor
    choices: Tensor


class RouterBalance(Objective):
    """Spreads tokens over the experts of a mixture; a part of a list.

    The loss of a process is its share: processes' mean is the loss of the global batch. Logs `idle_experts`, the share
    of experts that no token of the batch chose in any layer, and `busiest_expert`, the share of choices of the one that
    got most.
    """

    name = "router_balance"
    compares: ClassVar[bool] = False
    routes = True

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Used:
        sums = torch.cat([_present(side.routing) for side in (queries, documents)]).sum(0)  # (2 E,)
        own, _ = sums.chunk(2)
        every = sums.detach().clone()
        if world()[1] > 1:
            dist.all_reduce(every)
        return Used(own, *every.chunk(2))

    def compare(self, gathered: Used) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = gathered.probabilities.sum()  # times layers: probabilities of a token and layer add up to 1
        share = gathered.choices / tokens  # f (E,)
        mean = gathered.own / (tokens / world()[1])  # P, times processes, of own tokens
        metrics = {
            "idle_experts": (gathered.choices == 0).float().mean(),
            "busiest_expert": gathered.choices.max() / gathered.choices.sum(),
        }
        return len(share) * (share * mean).sum(), metrics


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise MmembedError("objective 'router_balance': the embeddings come without what their routers said")
    return tensor
