"""Keeps three messages of libraries from the user: advice on parts that mmembed does not use, on every start.

bitsandbytes (imported by peft whether or not anything is quantised) recommends a CPU kernel for 4-bit inference, which
`adapters` switches off. DeepSpeed (imported where it is installed) warns that it looked for an accelerator and found
none; told so, it does not look. Both are said before the libraries are imported. peft reads a property of transformers
under its old name; that warning is for peft's authors. Everything else that these libraries say is heard.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def silence_unused_parts() -> None:
    """Call before peft, bitsandbytes or DeepSpeed is imported; again does nothing new."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_about_the_kernel)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _not_about_the_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


@contextmanager
def old_name_in_peft() -> Iterator[None]:
    """Around the construction of a peft model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        yield
