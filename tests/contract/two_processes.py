"""Run by torchrun with two processes: name of an objective -> relative errors of loss, gradient and memory after two
steps, against one process with all queries, or with the share of each process after the other where the objective does
not look across processes."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from mmembed.training.gradcache import contrastive_step, reduce_gradients
from tests.contract.test_every_objective import MANY, NAMES, build
from tests.equivalence.toy import ToyEncoder, gradients, make_batch, relative, teaching

QUERIES = 12


def two_steps(name, shares, chunk_tokens=10**6):
    """Loss of the second step, gradients of both, memory; averaged over shares and processes.

    Args:
        shares: the first query of a batch, and how many there are.
    """
    encoder, objective = ToyEncoder(multi_vector=name in MANY).double(), build(name).double()
    teacher = teaching(encoder, objective)
    for seed in (0, 1):
        losses = []
        for first, count in shares:
            batch = make_batch(QUERIES, 5, chunk_tokens, seed=seed, first=first, count=count, positives=3)
            step = contrastive_step(encoder, objective, batch, keep_tokens=30, scale=1 / len(shares), teacher=teacher)
            losses.append(step[0])
        loss = torch.stack(losses).mean()
        objective.commit()
    reduce_gradients([*encoder.parameters(), *objective.parameters()])
    memory = [value.double().flatten() for _, value in objective.named_buffers()]
    return loss, gradients(encoder, objective), torch.cat(memory) if memory else torch.ones(1)


def main() -> None:
    expected = {
        name: two_steps(name, [(0, 12)] if build(name).across_processes else [(0, 6), (6, 6)]) for name in NAMES
    }
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report = {}
    for name in NAMES:
        # 6 queries each, in chunks of different sizes: the processes run a different number of forwards
        loss, gradient, memory = two_steps(name, [(6 * rank, 6)], 20 + 30 * rank)
        alone, gradient_alone, memory_alone = expected[name]
        report[name] = (0.0, relative(gradient, gradient_alone), relative(memory, memory_alone))
        dist.all_reduce(loss)
        report[name] = (abs(loss.item() / 2 - alone.item()) / abs(alone.item()), *report[name][1:])
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
