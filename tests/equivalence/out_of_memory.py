"""Training under a real memory limit: run as a process, prints what came out as one JSON object.

`python -m tests.equivalence.out_of_memory CONFIG MEGABYTES` trains a config; from the first step on the process may
grow by so many megabytes only (RLIMIT_AS; 0: no limit), and the allocator refuses what is beyond, in earnest.
Under torchrun `... CONFIG tokens=N` lets process 1 fail instead: a forward pass over more than N padded tokens asks
for 2^60 bytes.
"""

import json
import logging
import resource
import sys

import mmembed.backbones  # noqa: F401  (before transformers: torchvision on a CPU machine)

# isort: split
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from mmembed.config import load_config
from tests.runs import build_trainer


class Limit(TrainerCallback):
    def __init__(self, megabytes):
        self.megabytes = megabytes

    def on_train_begin(self, *_, **__):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + self.megabytes * 2**20,) * 2)


def main(config, limit, *overrides):
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    trainer = build_trainer(load_config(config, overrides))
    if limit.startswith("tokens="):
        most = int(limit.removeprefix("tokens="))

        def ask_for_too_much(module, arguments):
            if trainer.args.process_index == 1 and arguments[0].tensors["input_ids"].numel() > most:
                torch.empty(2**60, dtype=torch.uint8)

        trainer.model.model.register_forward_pre_hook(ask_for_too_much)
    elif int(limit):
        trainer.add_callback(Limit(int(limit)))
    trainer.train()
    history = trainer.state.log_history
    weights = [
        parameter.detach().double().sum().item() for parameter in trainer.model.parameters() if parameter.requires_grad
    ]
    budgets = [entry["chunk_tokens"] for entry in history if "chunk_tokens" in entry]
    if trainer.args.process_index == 0:
        losses = [entry["loss"] for entry in history if "loss" in entry]
        print(json.dumps({"losses": losses, "weights": weights, "budgets": budgets}), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
