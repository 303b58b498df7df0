"""The temperature that similarities are divided by: fixed, or learned as in CLIP (the logarithm of its inverse)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmembed.errors import ConfigError, nearest

SMALLEST = 0.01  # CLIP clips its learned scale at 100 (arXiv 2103.00020, section 2.5): below, training destabilises


class Temperature(nn.Module):
    """`temperature: 0.05`, or `{value: 0.05, learn: true}`."""

    def __init__(self, block: float | Mapping[str, Any]) -> None:
        super().__init__()
        options: dict[str, Any] = dict(block) if isinstance(block, Mapping) else {"value": block}
        for key in options:
            if key not in ("value", "learn"):
                raise ConfigError(f"objective.temperature: unknown key '{key}'; {nearest(key, ('value', 'learn'))}")
        value = options.get("value", 0.05)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"objective.temperature: found {value!r}; give a number above 0, for example 0.05")
        if not isinstance(options.get("learn", False), bool):
            raise ConfigError(f"objective.temperature.learn: found {options['learn']!r}; write true or false")
        self.learn: bool = options.get("learn", False)
        if self.learn and value < SMALLEST:
            raise ConfigError(f"objective.temperature: a learned one is kept at {SMALLEST} or above; start there")
        self.value = float(value)
        # (1,) and no scalar: DeepSpeed sends parameters as bytes
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / value)])) if self.learn else None

    def scale(self) -> Tensor | float:
        """What similarities are multiplied by."""
        if self.log_scale is None:
            return 1 / self.value
        with torch.no_grad():  # the parameter itself, as CLIP does after each step: beyond a clamp it had no gradient
            self.log_scale.clamp_(max=math.log(1 / SMALLEST))
        return self.log_scale.exp().squeeze(0)
