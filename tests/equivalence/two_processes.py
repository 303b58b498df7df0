"""Run by torchrun with two processes: prints the relative error of the mean loss and of the averaged gradient."""

import json

import torch
import torch.distributed as dist

from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step, reduce_gradients
from tests.equivalence.toy import Captioner, ToyEncoder, gradients, make_batch, relative

LOCAL = {"temperature": {"value": 0.1, "learn": True}, "symmetric": True, "cross_device_negatives": False}
BY_TASK = {
    "by_task": {
        "retrieval": {"type": "infonce", "temperature": 0.1},
        "sts": ["pearson", "pro", "rank_kl", {"type": "thresholded_infonce", "threshold": 0.7, "temperature": 0.1}],
    }
}
CASES = {
    "learned temperature": ({"temperature": {"value": 0.1, "learn": True}}, False, {}),
    "symmetric": ({"temperature": 0.1, "symmetric": True}, False, {}),
    "symmetric, several positives": ({"temperature": 0.1, "symmetric": True}, False, {"ragged": True}),
    "a false negative on the other process": ({"temperature": 0.1, "symmetric": True}, False, {"twins": True}),
    "late interaction": ({"temperature": 1.0}, True, {}),
    "coupled rows": ({"temperature": 0.1, "loss": "mann_whitney", "symmetric": True}, False, {"ragged": True}),
    "coupled rows, own group only": ({"temperature": 0.1, "loss": "dclw"}, False, {"in_batch": False}),
    "same tower": (
        {"temperature": 0.1, "loss": "dcl", "same_tower_negatives": True, "symmetric": True},
        False,
        {"ragged": True},
    ),
    "own group only": ({"temperature": 0.1}, False, {"in_batch": False}),
    "matryoshka": ({"temperature": 0.1, "matryoshka": {"dims": [8, 4]}}, False, {}),
    "layers": ({"temperature": 0.1, "symmetric": True, "matryoshka": {"layers": [1, -1], "dims": [8, 4]}}, False, {}),
    "layers, late interaction": ({"temperature": 1.0, "matryoshka": {"layers": [1, -1], "kl_weight": 0}}, True, {}),
    "a part on a lower layer": ([{"type": "uniformity"}, {"type": "infonce", "layer": 1}], False, {}),
    "negatives of its own process": (LOCAL, False, {"twins": True}),
    "one positive at a time": ({"temperature": 0.1, "positives": "one_at_a_time"}, False, {"ragged": True}),
    "by task, retrieval": (BY_TASK, False, {}),
    "by task, graded pairs": (BY_TASK, False, {"graded": True}),  # compared within each process
    "captioning": ([{"type": "infonce", "temperature": 0.1}, {"type": "captioning", "sides": "both"}], False, {}),
}


def main() -> None:
    expected = {name: single_process(*case) for name, case in CASES.items()}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report = {}
    for name, (options, multi_vector, labels) in CASES.items():
        objective = build(options)
        encoder = build_encoder(objective, multi_vector)
        # 3 queries each, in chunks of different sizes: the processes run a different number of forwards
        batch = make_batch(6, 3, 20 + 30 * rank, first=3 * rank, count=3, **labels)
        loss, metrics = contrastive_step(encoder, objective, batch, keep_tokens=30)
        if options is LOCAL:  # 9 documents of its own, less the positive
            assert metrics["negatives"].item() == 8, metrics["negatives"]
        elif labels.get("twins"):  # rank 0 holds the first query, rank 1 the last: 17 others, less the twin's positive
            assert abs(metrics["negatives"].item() - 17 + 1 / 3) < 1e-5, metrics["negatives"]
        if rank == 0:  # used by one process alone
            encoder.unused.weight.sum().backward()
        reduce_gradients([*encoder.parameters(), *objective.parameters()])
        assert encoder.unused.bias.grad is None  # used by no process
        dist.all_reduce(loss)
        expected_loss, expected_gradient = expected[name]
        error = abs(loss.item() / 2 - expected_loss) / expected_loss
        report[name] = (error, relative(gradients(encoder, objective), expected_gradient))
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def single_process(options, multi_vector, labels):
    """Loss and gradient of the whole batch in one process; where others are not looked at, the means of its halves."""
    objective = build(options)
    encoder = build_encoder(objective, multi_vector)
    alone = options is LOCAL or labels.get("graded")
    halves = [{"first": 0, "count": 3}, {"first": 3, "count": 3}] if alone else [{}]
    share = 1 / len(halves)
    batches = [make_batch(6, 3, 10**6, **labels, **half) for half in halves]
    losses = [contrastive_step(encoder, objective, batch, None, scale=share)[0].item() for batch in batches]
    (encoder.unused.weight.sum() / 2).backward()
    return sum(losses) * share, gradients(encoder, objective)


def build_encoder(objective, multi_vector):
    return (Captioner if objective.predicts else ToyEncoder)(multi_vector=multi_vector, layers=objective.layers)


def build(options):
    whole = isinstance(options, list) or "by_task" in options
    return build_objective(options if whole else {"type": "contrastive", **options}, depth=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
