"""A process of ours in another environment: under `mmembed.guard`, what it says in a file, stopped for certain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from data_tools.generators import GeneratorDown
from mmembed import guard, vllm_environment

_READ, _SHOWN, _WIDE = 400, 8, 400  # lines of a log that are searched and shown in an error; characters
_OPTIONS = {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}}
_CAUSE = re.compile(r"\b[A-Z]\w*(Error|Exception): \S.*")


class Child:
    """A command that ends with this process.

    Args:
        log: file that its output is added to; None writes one in the folder of temporary files, which `stop` removes
            where the command ended well.
        piped: whether we write its input and read its output, which then does not go to the log.

    Raises:
        GeneratorDown: the system starts no process, or the log cannot be written.
    """

    def __init__(self, command: Sequence[str], log: str | None, piped: bool = False) -> None:
        self._temporary = log is None
        try:
            if log is None:
                descriptor, log = tempfile.mkstemp(prefix="mmembed-generator-", suffix=".log")
                os.close(descriptor)
            self.log = Path(log)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.process = self._begin(command, subprocess.PIPE if piped else None)
        except OSError as error:
            raise GeneratorDown(f"the process of an engine cannot be started, with the log {log}: {error}") from error

    def _begin(self, command: Sequence[str], pipe: int | None) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(os.getpid()), *command],
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                start_new_session=True,
                env={"VLLM_NO_USAGE_STATS": "1", **os.environ, "PYTHONSAFEPATH": "1"},
            )

    @property
    def input(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """The end of its log, for an error."""
        self._temporary = False  # it is named in an error: whoever reads that wants the file
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_READ:]
        except OSError as error:
            return f"its log cannot be read ({error})"
        causes = list(dict.fromkeys(found[0] for line in lines if (found := _CAUSE.search(line))))
        shown = [f"    {line[:_WIDE]}" for line in [*causes[:_SHOWN], "...", *lines[-_SHOWN:]]]
        return "\n".join([f"errors and last lines of {self.log}:", *shown])

    def stop(self) -> None:
        """Ends it and all that it started; returns when they are gone."""
        if self.alive:
            self.process.terminate()
        try:
            self.process.wait(guard.GRACE + 5)
        except subprocess.TimeoutExpired:  # the guard itself hangs: the system ends its command with it
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was to be written has no reader any more
                    stream.close()
        if self._temporary:
            self.log.unlink(missing_ok=True)


def vllm_python(python: str | None, where: str) -> str:
    """The interpreter that has vLLM: the given one, that of `make vllm-env`, our own.

    Raises:
        GeneratorDown: there is none.
    """
    if python is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise GeneratorDown(f"{where}.python: {python} is no interpreter; correct the path")
        return python
    found = vllm_environment.find_vllm()
    if found is not None:
        return found
    environment, repository = vllm_environment.ENVIRONMENT, vllm_environment.REPOSITORY
    raise GeneratorDown(
        f"{where}.python: there is no {environment} here or in {repository}, and this environment has no vllm, which "
        f"pins torch and transformers; run `make vllm-env`, or give the interpreter of an environment that has it"
    )


def engine_options(python: str, given: Mapping[str, object]) -> dict[str, object]:
    """What vLLM's engine is started with: the given options over our defaults.

    Answers of a schema have no white space between their parts, and llguidance holds them to it: bounds of lengths,
    which our schemas have, cost xgrammar a multiple of the model's own time. On a CPU prompts are read whole: vLLM 0.32
    dies of a request with a seed of whose prompt it has read a part, because it cannot wind back a CPU's generator.
    """
    options = {**_OPTIONS, **given}
    whole = "max_num_batched_tokens" not in given  # which would have to be max_model_len or more
    return {"enable_chunked_prefill": False, **options} if whole and vllm_environment.is_for_cpus(python) else options
