"""The worst batch first: what would run out of memory after hours runs out of it in the first minute.

The planned batch with the most padded tokens (visual ones counted) goes forward and backward before step 1, beside as
much memory as the optimizer's state will take. Its gradients are dropped and the random state is put back: the
trajectory is the same, bit for bit, unless memory runs out and the budget is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mmembed.data.batch_plan import BatchPlan, Draw
from mmembed.data.collate import Batch
from mmembed.objectives.gather import world

INPUTS = 20_000  # that are tokenized to find it, where the number of batches is not given: a second or two


def worst_batch(
    plan: BatchPlan,
    collate: Callable[[Sequence[Draw]], Batch],
    inputs_a_query: int,
    count: int | None,
    device: torch.device,
) -> tuple[Batch, int, int]:
    """This process's share of the worst global batch of the plan's epoch.

    Args:
        collate: draws -> the batch.
        inputs_a_query: at most, to bound the work.
        count: batches to look at, evenly spread; None: as many as hold INPUTS inputs.

    Returns:
        The batch, its number in the epoch, and how many were looked at. All processes choose the same number: that of
        the largest share of any process.
    """
    most = count or max(1, INPUTS // (max(plan.batch_sizes) * inputs_a_query))
    step = max(1, -(-len(plan) // most))
    seen = [(number, draws) for number, draws in enumerate(plan) if number % step == 0]
    tokens = torch.tensor([collate(draws).padded_tokens for _, draws in seen], device=device)  # (n,)
    if world()[1] > 1:
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX)
    number, draws = seen[int(tokens.argmax())]
    return collate(draws), number, len(seen)
