"""Which parts of a model compute something else in training mode: they draw random numbers, or look at the batch.

There is no one place where a model says so. Dropout may be a module, a rate that an attention function is called with
(`attention_dropout`), a probability of dropping a whole layer (`drop_path`, `drop_prob`), or a rate that is read from
the configuration when it is used; batch normalisation replaces what it has learned by the statistics of the batch. So
any rate above zero whose name speaks of dropping counts, also one that is never used: taken for random by mistake, a
part is only computed more slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


def draws(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The first part that draws random numbers in training, and what says so; None where all stand still."""
    for name, module in modules:
        rates = {"p": module.p} if isinstance(module, _DropoutNd) else dropping(vars(module))
        for rate, value in rates.items():
            if value > 0:
                return f"'{name}' drops values at random in training ({rate}: {value:g})"
    return None


def looks_at_the_batch(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The first part whose outputs in training depend on the other inputs of the batch; None where there is none."""
    for name, module in modules:
        if isinstance(module, _NormBase) and module.track_running_stats:
            return f"'{name}' normalises by the batch in training"
    return None


def dropping(values: Mapping[str, Any]) -> dict[str, float]:
    """Entries whose name speaks of dropping and whose value is a rate, of a module or a configuration."""
    return {name: value for name, value in values.items() if "drop" in name and isinstance(value, float) and value > 0}
