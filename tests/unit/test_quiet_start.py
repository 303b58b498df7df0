"""What is printed before the first line of our own: nothing. What libraries really have to say is still heard."""

from __future__ import annotations

import logging
import subprocess
import sys

from families import build

SCRIPT = """
import mmembed.backbones
import peft
import deepspeed
from deepspeed.accelerator import get_accelerator
get_accelerator()
"""


def test_imports_say_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_other_warnings_of_the_same_logger_are_heard(caplog) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
    logger.warning("something broke")
    assert [record.getMessage() for record in caplog.records] == ["something broke"]


def test_adapters_are_built_without_a_warning(family_folder, recwarn) -> None:
    build(
        family_folder("qwen3"), adapter={"type": "lora", "r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "auto"}
    )
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []


def test_tests_do_not_ask_the_hub() -> None:
    """Also where pytest is started alone, without the Makefile's environment."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
