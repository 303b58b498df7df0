"""The teacher: a second set of the trained weights, which follows them slowly (momentum encoders, EMA teachers).

theta' <- m theta' + (1 - m) theta   after each optimizer step, from theta' = theta at the start, 0 < m <= 1

which is MoCo's sequence (arXiv 1911.05722, eq. 2: there before the keys of the next batch are encoded). m = 1 is the
model that training starts from. An objective asks for it by its `teacher_momentum`; there is one a run.

Only what is trained is there twice: with an adapter its weights and the heads, all else is the student's. Values are
kept in 32 bits at least, for in 16 a step of 1 - m would be lost. The teacher encodes in eval mode: ESimCSE's has no
dropout, and the student's random numbers are the same with and without one. Every process holds it whole, so ZeRO-3 and
FSDP2, which divide the weights whose place it takes, are refused.

Cost: the trained weights once more (and once again while it encodes, where the model has them in 16 bits), a forward
pass of each batch, and one multiplication a trained weight and step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.folder import check_fit, read_tensors
from mmembed.objectives import Objective

FILE = "teacher.safetensors"


class Teacher:
    """The second weights of a model.

    Args:
        model: whose trained parameters it has; only trained parameters count.
        momentum: m.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.model, self.momentum = model, momentum
        self._followed = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._values: dict[str, Tensor] = {}

    def __str__(self) -> str:
        what = "the model as it is now" if self.momentum == 1 else f"momentum {self.momentum:g}"
        return f"teacher: {what}, {self.size / 2**20:,.1f} MB, encodes each batch once more without gradients"

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(one.numel() * _kept_in(one).itemsize for one in self._followed.values())

    @torch.no_grad()
    def begin(self) -> None:
        """Takes the weights as they are, unless it has some."""
        if not self._values:
            self._values = {name: one.detach().to(_kept_in(one), copy=True) for name, one in self._followed.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """The update after an optimizer step."""
        if self.momentum < 1:
            for name, value in self._values.items():
                value.lerp_(self._followed[name].to(value.dtype), 1 - self.momentum)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the teacher's weights, and is in eval mode, for passes without gradients. No graph of the
        student may be alive that will be sent back after it."""
        students, was_training = {name: one.data for name, one in self._followed.items()}, self.model.training
        self.model.eval()
        try:
            self._put({name: self._values[name].to(one.dtype) for name, one in self._followed.items()})
            yield
        finally:
            self._put(students)
            self.model.train(was_training)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._followed.items():
            parameter.data = weights[name]
        torch.clear_autocast_cache()  # casts that an autocast around both models keeps are found by the parameter

    def save(self, folder: Path) -> None:
        """Writes it beside a checkpoint."""
        from safetensors.torch import save_file

        save_file({name: value.cpu().contiguous() for name, value in self._values.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote, in place of what it has.

        Raises:
            CheckpointError: it is missing, broken, or of other weights.
        """
        if not (folder / FILE).exists():
            raise CheckpointError(
                f"{folder}: holds no {FILE}, so it is of a run without a teacher (momentum {self.momentum:g}); start "
                "again in another training.output_dir, or set the objective's momentum to null"
            )
        found = read_tensors(folder / FILE)
        check_fit(folder / FILE, self._followed, found)
        self._values = {
            name: found[name].to(one.device, _kept_in(one), copy=True) for name, one in self._followed.items()
        }


class Following(TrainerCallback):
    """Lets a teacher follow after each optimizer step."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_optimizer_step(self, *arguments: Any, **more: Any) -> None:
        self.teacher.follow()


def teacher_of(model: nn.Module, objective: Objective) -> Teacher | None:
    """The teacher that an objective asks for; None where it asks for none."""
    momentum = objective.teacher_momentum
    return None if momentum is None else Teacher(model, momentum)


def refuse_divided(objective: Objective) -> None:
    """Raises ConfigError where an objective asks for a teacher; to be called where processes divide the weights."""
    if objective.teacher_momentum is not None:
        raise ConfigError(
            f"objective: learns from a teacher (momentum {objective.teacher_momentum:g}), whose weights take the place "
            "of the model's, and ZeRO-3 and FSDP2 divide these; launch with recipes/accelerate/ddp.yaml, zero1.yaml or "
            "zero2.yaml, or set the objective's momentum to null, which does without a teacher"
        )


def _kept_in(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
