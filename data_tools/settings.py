"""What the configs of the data commands share: where they read and write, and how strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmembed.config.blocks import MediaLimitsConfig, Positive
from mmembed.errors import ConfigError
from mmembed.media_limits import MediaLimits
from mmembed.workers import Workers, check_ray


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RayConfig(Block):
    """Workers of a Ray cluster; see `mmembed.workers.Workers`.

    address: of a running cluster (auto, HOST:PORT), or local for one of this machine.
    workers: each with a model or generator of its own.
    threads, gpus: of each.
    """

    address: str = "local"
    workers: Positive = 1
    threads: Positive = 1
    gpus: float | None = Field(default=None, ge=0)

    @property
    def used(self) -> Workers:
        """Raises MmembedError where Ray is not installed."""
        check_ray()
        return Workers(self.address, self.workers, self.threads, self.gpus)


class Reading(Block):
    """A run that reads sources and writes below `output`; the other keys are those of `data` of a training run."""

    output: str
    root: str | None = None
    media_root: str | None = None
    media_limits: MediaLimitsConfig = MediaLimitsConfig()
    on_bad_record: Literal["raise", "skip"] = "raise"

    @property
    def limits(self) -> MediaLimits:
        return MediaLimits(**self.media_limits.model_dump())

    def below_root(self, path: str) -> Path:
        """An absolute path of one in the config."""
        return (Path(path) if self.root is None else Path(self.root) / path).absolute()


def listed(value: Any) -> Any:
    """Raises ConfigError for one thing where a list is asked for."""
    if isinstance(value, str | dict):
        raise ConfigError(f"found {value!r}; write a list: [{value if isinstance(value, str) else '{...}'}]")
    return value
