"""What has been added up since the last log: metrics, throughput, and what the health monitors saw."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_PREFIX, _STEPS = "sum.", "steps."


class Tally:
    """Sums of one process. A checkpoint keeps them, so that the log of a resumed run is that of one that never stopped.

    Attributes:
        health: numbers of the last step that is logged, which are no means.
    """

    def __init__(self) -> None:
        self._begin()

    def add(self, metrics: Mapping[str, Tensor], pairs: int, tokens: int) -> None:
        """Counts a batch of all processes: its metrics are tensors, for which no device is waited here."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
            self._steps[name] = self._steps.get(name, 0) + 1
        self.steps += 1
        self._counts["pairs"] += pairs
        self._counts["tokens"] += tokens

    def take(self) -> dict[str, float]:
        """Means of the metrics over the steps that had them, pairs and tokens a second, and the health.

        The sums begin anew.
        """
        seconds = time.perf_counter() - self._since
        logs = {name: float(value) / self._steps[name] for name, value in self._sums.items()}
        logs |= {f"{unit}_per_second": round(count / seconds, 1) for unit, count in self._counts.items()}
        logs |= self.health
        self._begin()
        return logs

    def forget_rehearsal(self) -> None:
        """Drops the health and the time so far."""
        self.health.clear()
        self._since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Takes the time of an evaluation out of the throughput."""
        self._since += seconds

    def tensors(self) -> dict[str, Tensor]:
        """The sums under the names that `restore` knows."""
        counts = {_STEPS + name: torch.tensor(count) for name, count in self._steps.items()}
        return {_PREFIX + name: value for name, value in self._sums.items()} | counts

    def restore(self, saved: Sequence[Mapping[str, Tensor]], steps: int, device: torch.device) -> None:
        """Takes over the means of the `tensors` of several processes. Throughput is of this process's own time."""
        self._begin()
        self.steps = steps
        for name in saved[0]:
            if name.startswith(_PREFIX):
                mean = torch.stack([one[name] for one in saved]).mean(0)
                name = name.removeprefix(_PREFIX)
                self._sums[name] = mean.to(device)
                self._steps[name] = int(saved[0].get(_STEPS + name, steps))  # earlier versions: all steps

    def _begin(self) -> None:
        self.health: dict[str, float] = {}
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._counts = {"pairs": 0, "tokens": 0}
        self._since = time.perf_counter()
