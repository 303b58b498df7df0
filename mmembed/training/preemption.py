"""SIGTERM and SIGUSR1 end a run with a complete checkpoint: what schedulers send before they take a machine away.

The signal only raises a flag. At the end of the step all processes ask each other for it (one number a step, beside the
gather of the batch), so a signal that reached one of them stops all at the same step. An evaluation that is due there
comes first, because a resumed run would not make it up; then the checkpoint; then `Preempted`, which the command turns
into exit status 75. Before the first step and after the last one the signals do what they usually do.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, seed_worker

from mmembed.errors import Preempted
from mmembed.objectives.gather import world

logger = logging.getLogger(__name__)
SIGNALS = tuple(one for one in signal.Signals if one.name in ("SIGTERM", "SIGUSR1"))  # Windows has no SIGUSR1


class Preemption(TrainerCallback):
    """Use as a context around the training loop, and as one of its callbacks."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopping = False
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set a handler
            self._usual = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.stopping = self.stopping or self._anywhere(args.device)
        if self.stopping:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.stopping:
            return
        if world()[1] > 1:
            dist.barrier()  # a launcher ends the others as soon as one has ended: the first may still be writing
        name = "another process" if self.received is None else signal.Signals(self.received).name
        raise Preempted(
            f"stopped by {name} after step {state.global_step}; checkpoint-{state.global_step} is complete: the same "
            "command goes on from it"
        )

    def _anywhere(self, device: torch.device) -> bool:
        """Whether any process received a signal."""
        if world()[1] == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class SaveAfterEpochEnd(TrainerCallback):
    """Puts off a checkpoint of an epoch's last step until what is due at the epoch's end is done.

    Otherwise a run that is killed in between would never make up that evaluation, and miss the best metric.
    """

    def __init__(self) -> None:
        self._owed = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        ends = control.should_training_stop or control.should_epoch_stop or float(state.epoch or 0).is_integer()
        by_epoch = IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)
        self._owed = control.should_save and ends and by_epoch
        if self._owed:
            control.should_save = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_save = control.should_save or self._owed
        self._owed = False
        return control


def start_worker(worker: int, *, num_workers: int, rank: int) -> None:
    """Seeds a data worker. Signals to the whole process group are the trainer's business: a worker that died of one
    would take the trainer with it before its checkpoint is written. The tokenizer's threads did not come along with the
    fork: a worker that waited for them, as TOKENIZERS_PARALLELISM=true asks, would wait for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seed_worker(worker, num_workers=num_workers, rank=rank)
