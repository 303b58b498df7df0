"""Whether a device that somebody named is there, asked before weights are loaded for it."""

from __future__ import annotations

import torch

from mmembed.errors import MmembedError


def check_device(name: str | None) -> None:
    """Raises MmembedError where torch has no device of that name, with those that there are."""
    if name is None:
        return
    try:
        if torch.device(name).type == "meta":  # torch's own, for shapes without values
            raise RuntimeError
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError, NotImplementedError):
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise MmembedError(f"device: '{name}' is not there; known: {', '.join(there)}") from None
