"""Optimizers by name, with a learning rate a tower.

adamw: torch's fused AdamW. adamw_8bit: bitsandbytes (quant extra), moments in 8 bits for tensors of 4,096 values and
more, embeddings in 32. lion: below. adafactor: transformers', with the learning rate as given. Or any name that
transformers.TrainingArguments.optim knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from transformers.training_args import OptimizerNames

from mmembed.config.blocks import EmbedderConfig, frozen_rate
from mmembed.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIM_NAMES = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}


def optimizer_name(config: EmbedderConfig, args: TrainingArguments) -> str:
    """The run's optimizer under the name that was given, or transformers' name of its default."""
    return config.training.optimizer or OptimizerNames(args.optim).value


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum, decoupled decay.

    u = sign(b1 m + (1 - b1) g);  p <- p (1 - lr wd) - lr u;  m <- b2 m + (1 - b2) g

    Learning rates are 3 to 10 times below AdamW's and weight decay 3 to 10 times above (section 5 of the paper).
    State: one tensor a parameter.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                update = momentum.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - rate * decay).add_(update, alpha=-rate)
                momentum.lerp_(parameter.grad, 1 - beta2)
        return loss


_TRAINED_BY = {  # what makes a tower's rate act
    "vision": "the backbone needs a vision tower that the adapter reaches (adapter.target_modules)",
    "audio": "the backbone needs an audio tower that the adapter reaches (adapter.target_modules)",
    "projector": "adapter.target_modules auto leaves it out; use all-linear, or adapter.type none",
    "router": "only a mixture of experts has one; an adapter trains it with adapter.router: true",
    "language": "the adapter has to reach it (adapter.target_modules)",
    "pooling": "this pooling has no weights, and there is no projection",
    "objective": "a fixed temperature is no parameter; objective.temperature: {value: 0.05, learn: true} learns it",
}


def refuse_idle_rates(rates: Iterable[str], trained: Collection[str], freeze: Collection[str]) -> None:
    """Refuses a learning rate that would act on nothing.

    Args:
        rates: towers that `training.learning_rates` names.
        trained: towers with a parameter that is trained; where the model is not loaded yet, those that may have one.
        freeze: `model.freeze`.

    Raises:
        ConfigError: with the tower, and what would make its rate act.
    """
    for tower in rates:
        if tower in freeze:
            raise ConfigError(frozen_rate(tower, freeze))
        if tower not in trained:
            raise ConfigError(
                f"training.learning_rates.{tower}: this run trains no parameter of that tower: {_TRAINED_BY[tower]}; "
                f"remove the rate (trained: {', '.join(sorted(trained))})"
            )


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    tower_of: Callable[[str], str],
    decayed: set[str],
    learning_rate: float,
    learning_rates: dict[str, float],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """One group a (tower, decayed or not), so that each tower has its own learning rate.

    Args:
        parameters: (name, parameter) pairs; frozen ones are left out.
        tower_of: name -> tower.
        decayed: names that weight decay applies to.
        learning_rates: tower -> rate; the others use `learning_rate`.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        tower, decays = tower_of(name), name in decayed
        group = groups.setdefault(
            (tower, decays),
            {
                "params": [],
                "lr": learning_rates.get(tower, learning_rate),
                "weight_decay": weight_decay if decays else 0.0,
                "tower": tower,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
