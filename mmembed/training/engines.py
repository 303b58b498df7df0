"""How processes share a model, for the step, for saving and for loading: each whole (DDP), DeepSpeed ZeRO, or FSDP2.

An engine answers five questions of the trainer: whether a forward is a collective (then all processes have to run as
many), how a chunk's gradient goes back and is reduced on the last chunk, how large it is then, what the whole weights
are, and how they are put back. ZeRO-2 and ZeRO-3 reduce every chunk's gradient into their shards, as they keep no whole
one; DDP, ZeRO-1 and FSDP2 reduce once a step, which costs FSDP2 the memory of whole gradients of what is trained.
Where a process keeps a piece of the gradient, its norm takes one number a part over the wire: the sum of squares.

Parameters of the objective are used outside of the model's forward: FSDP2 does not shard them, ZeRO-3 keeps them whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmembed.errors import ConfigError
from mmembed.training.gradcache import Backward, reduce_gradients
from mmembed.training.health import norm_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


def offer_on_cpu(args: TrainingArguments) -> None:
    """Lets accelerate use DeepSpeed and FSDP on CPU processes, which it otherwise trains with DDP, without a word.

    It looks for the variable again when the trainer makes its Accelerator, and knows FSDP on several GPUs only; the
    process group is there already, so nothing moves to a GPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if args.device.type != "cpu" or not (args.deepspeed_plugin or args.fsdp):
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if args.fsdp:
        PartialState().distributed_type = DistributedType.MULTI_GPU


def engine_of(accelerator: Accelerator, args: TrainingArguments) -> Engine:
    """The engine that accelerate was set up with. Raises ConfigError where it is not the one that was asked for."""
    from accelerate.utils import DistributedType

    found = accelerator.distributed_type
    wanted = DistributedType.DEEPSPEED if args.deepspeed_plugin else DistributedType.FSDP if args.fsdp else None
    if wanted is not None and found is not wanted:
        raise ConfigError(f"{wanted.value} was asked for, but accelerate would train with {found.value}")
    if wanted is DistributedType.DEEPSPEED:
        return DeepSpeed(accelerator)
    return FSDP2(accelerator) if wanted is DistributedType.FSDP else Engine(accelerator)


class Engine:
    """One process, or several that each hold the whole model and average gradients once a step.

    lockstep: forwards and backwards are collectives; processes must run as many of them, through the same parts.
    sharded: no process holds all weights; `full_state` and `load` are collectives.
    """

    lockstep = False
    sharded = False
    optimizer_share = 1.0  # of the optimizer's state, made in the first step, that comes to this process

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def __str__(self) -> str:
        return "every process holds the whole model" if self.accelerator.num_processes > 1 else "one process"

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Around what calls into the engine again and again: nobody can act on the warnings about its own code."""
        yield

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """DDP must not reduce by itself: processes may run another number of chunks, over other parameters. It wraps a
        model of one process too, where accelerate's own `no_sync` does nothing."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def backward(self, model: nn.Module, steps: bool) -> Backward | None:
        """How gradients go back into the model; None for plain autograd.

        Args:
            steps: whether the last chunk ends an optimizer step.
        """
        return None

    def reduce(self, model: nn.Module, objective: nn.Module) -> None:
        """After the last chunk of a step: averages gradients that `backward` did not."""
        reduce_gradients(model.parameters())

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """The norm of the reduced gradient of some parameters, between `reduce` and `step`; all processes ask for it.

        None where the batch did not reach them. In lockstep that looks like a gradient of 0, which is None too.
        """
        return norm_of(parameters)

    def step(self) -> None:
        """After the last chunk of a step, when its gradients were looked at: steps, where the loop does not."""

    def prepared(self, objective: nn.Module) -> None:
        """After the model was wrapped."""

    def loss_scale(self) -> float | None:
        """What gradients are multiplied by in fp16; None elsewhere."""
        scaler = self.accelerator.scaler  # starts when it is given something to scale
        return None if scaler is None else float(scaler.scale(torch.ones((), device=self.accelerator.device)))

    def computes_in(self) -> torch.dtype | None:
        """What the forward pass rounds the weights to; None where they are used as they are."""
        return None

    def full_state(self, model: nn.Module, frozen: bool) -> dict[str, Tensor] | None:
        """The whole weights on the CPU of the main process, {} on others; None where the model has them itself.

        Args:
            frozen: weights that are not trained too.
        """
        return None


class DeepSpeed(Engine):
    """ZeRO: the engine reduces in the backward pass, clips and steps in its own `step`. It reduces parameters as they
    become ready, so every process has to send gradients to the same ones as often."""

    lockstep = True
    optimizer_share = 0.0  # made with the engine

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        self.sharded = self.stage == 3

    def __str__(self) -> str:
        held = {
            0: "",
            1: "optimizer state",
            2: "optimizer state and gradients",
            3: "optimizer state, gradients, weights",
        }
        return f"DeepSpeed ZeRO-{self.stage} divides {held[self.stage] or 'nothing'}"

    @contextmanager
    def quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated")  # its calls, each time
            yield

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, model: nn.Module, steps: bool) -> Backward:
        def back(outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
            surrogate = sum((output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True))
            engine = self.accelerator.deepspeed_engine_wrapped.engine  # accelerate's own `backward` would step here
            engine.set_gradient_accumulation_boundary(last and steps)
            engine.backward(surrogate, scale_wrt_gas=False)

        return back

    def reduce(self, model: nn.Module, objective: nn.Module) -> None:
        """The engine did."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        if self.stage == 0:
            return norm_of(parameters)
        total = torch.zeros((), device=self.accelerator.device)
        for piece in map(self._piece, parameters):
            if piece is not None:
                total += torch.linalg.vector_norm(piece, dtype=torch.float32).to(total.device).square()
        dist.all_reduce(total)
        return total.sqrt() if total else None

    def _piece(self, parameter: Any) -> Tensor | None:
        """What this process keeps of a reduced gradient; None where that is nothing.

        `deepspeed.utils.safe_get_full_grad` would send all of it to every process, and take the memory of the largest.
        """
        if self.sharded:
            optimizer = self.accelerator.deepspeed_engine_wrapped.engine.optimizer
            local: Tensor = optimizer.get_local_fp32_grad_for_param(parameter)
            return local
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        held: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        own = mapping.lp_fragment_address
        # ZeRO-1 that adds bf16 gradients in 32 bits (data_types.grad_accum_dtype) holds the whole one on each process.
        return held if held.numel() == own.numel else held.narrow(0, own.start, own.numel)

    def step(self) -> None:
        self.accelerator.deepspeed_engine_wrapped.engine.step()

    def prepared(self, objective: nn.Module) -> None:
        self._refuse_lost_gradients(objective)
        if not self.sharded:
            return
        parameter: Any  # with what DeepSpeed adds
        for parameter in objective.parameters():  # DeepSpeed gathers what a module's call uses; these are used outside
            if not parameter.ds_persist:
                raise ConfigError(
                    "training.deepspeed: zero_optimization.stage3_param_persistence_threshold is too small to keep the "
                    f"objective's {parameter.ds_numel:,} learned numbers whole; write a number above that"
                )
            parameter.all_gather()

    def _refuse_lost_gradients(self, objective: nn.Module) -> None:
        """ZeRO-1 that adds bf16 gradients in 32 bits empties them when the backward pass reaches the model: what the
        objective's own parameters got until then is gone."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        adds_apart = self.stage == 1 and engine.get_data_types() == (torch.bfloat16, torch.float32)
        learns = any(parameter.requires_grad for parameter in objective.parameters())
        if adds_apart and learns and not engine.zero_cpu_offload():
            raise ConfigError(
                "training.deepspeed: data_types.grad_accum_dtype 'fp32' under ZeRO-1 in bf16 loses the gradient of "
                "what the objective learns (its temperature); set zero_optimization.stage: 2, or remove "
                "grad_accum_dtype"
            )

    def loss_scale(self) -> float | None:
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None

    def full_state(self, model: nn.Module, frozen: bool) -> dict[str, Tensor] | None:
        if not self.sharded:
            return None
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        with self.quiet():
            return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=not frozen) or {}


class FSDP2(Engine):
    """`fully_shard`: weights are gathered a decoder layer at a time; gradients scattered on the last chunk.

    In half precision the weights are rounded as they are gathered. Vectors leave the model in 32 bits, and gradients
    are added and scattered in 32 bits (torchtitan's default): accelerate's policy would round both, and the scores.
    """

    lockstep = True
    sharded = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.optimizer_share = 1 / accelerator.num_processes
        plugin = accelerator.state.fsdp_plugin
        self._half: torch.dtype | None = None
        if plugin.mixed_precision_policy is not None:
            self._half = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def __str__(self) -> str:
        return "FSDP2 divides optimizer state, gradients, weights"

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, model: nn.Module, steps: bool) -> Backward:
        def back(outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
            model.set_requires_gradient_sync(last and steps)  # type: ignore[operator]
            torch.autograd.backward(outputs, gradients)

        return back

    def reduce(self, model: nn.Module, objective: nn.Module) -> None:
        reduce_gradients(objective.parameters())

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        from torch.distributed.tensor import DTensor

        total = norm_of(parameters)
        whole = total.full_tensor() if isinstance(total, DTensor) else total
        return whole if whole else None

    def computes_in(self) -> torch.dtype | None:
        return self._half

    def full_state(self, model: nn.Module, frozen: bool) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        parameters = {name for name, _ in model.named_parameters()}
        state = {}
        for name, value in model.state_dict().items():
            if frozen or name in trained or name not in parameters:
                whole = value.full_tensor() if isinstance(value, DTensor) else value  # all processes take part
                if self.accelerator.is_main_process:
                    state[name] = whole.detach().cpu()
        return state
