"""Runs commands of the project one behind another as one job: from documents to an evaluated embedder and reranker.

    python -m recipes.run_pipeline --config recipes/configs/pipelines/synthetic.yaml output=runs/synthetic
    python -m recipes.run_pipeline --config ... values.generator='{type: vllm, model: Qwen/Qwen3-4B-Instruct-2507}'

Each step is a process of its own, exactly as a user would type it, and goes on by itself where it was killed. The job
notes which steps are done, each under a digest of its command, its config and the steps before it: the same command
again passes over them; a step that would run otherwise now, and all behind it, run anew, in folders that are emptied
first. A step ends with the job, also when that is killed. One job at a time holds a folder.
docs/synthesis.md has the config. Exit status: 0 done, 2 refused, 130 stopped, else that of the step that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

if __name__ == "__main__" and __package__ is None:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmembed.arguments import Parser
from mmembed.config import load_blocks
from mmembed.errors import ConfigError, MmembedError, nearest
from mmembed.locks import only_one

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = "recipes/configs/pipelines"
COMMANDS = (
    "data_tools.synthesize", "data_tools.mine_negatives", "data_tools.score", "data_tools.convert",
    "data_tools.inspect", "recipes.train_embedder", "recipes.train_reranker", "recipes.train_generative_reranker",
    "eval.run", "eval.rerank",
)  # fmt: skip
_NAME = re.compile(r"\{([A-Za-z_]+)\}")


class StepConfig(BaseModel):
    """One command.

    run: its module.
    config: its YAML file, in the repository; `set` are overrides of its keys.
    arguments: of commands without a config.
    launcher: `accelerate` starts it on all devices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    run: str
    config: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    launcher: Literal["python", "accelerate"] = "python"

    @model_validator(mode="after")
    def _known(self) -> StepConfig:
        if self.run not in COMMANDS:
            raise ConfigError(f"steps '{self.name}': there is no command '{self.run}'; {nearest(self.run, COMMANDS)}")
        if self.set and self.config is None:
            raise ConfigError(f"steps '{self.name}': 'set' has no effect without 'config'; write `arguments`")
        return self


class PipelineConfig(BaseModel):
    """A job. values: what `{name}` in steps stands for; `{output}` is the job's folder, `{here}` the step's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    output: str
    values: dict[str, Any] = Field(default_factory=dict)
    steps: tuple[StepConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> PipelineConfig:
        names = [step.name for step in self.steps]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"steps: '{name}' is there twice; give each a name of its own")
        return self


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"a YAML file, for example {EXAMPLES}/synthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: output=runs/mine")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_blocks(PipelineConfig, options.config, options.overrides, EXAMPLES)
        output = Path(config.output).absolute()
        commands = {step.name: command_of(step, config, output) for step in config.steps}  # all, before the first
        with only_one(output):
            return run(config, output, commands)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or output}: {error.strerror or error}; what is done is kept: correct that, then "
            "the same command goes on",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130


def run(config: PipelineConfig, output: Path, commands: dict[str, list[str]]) -> int:
    """Carries out what is left of the steps, in a folder that this process holds."""
    record = output / "steps.json"
    done: dict[str, dict[str, Any]] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    before = ""
    for number, step in enumerate(config.steps, start=1):
        command, here = commands[step.name], output / step.name
        file = "" if step.config is None else (REPOSITORY / step.config).read_text(encoding="utf-8")
        before = hashlib.sha256(json.dumps([before, command, file]).encode()).hexdigest()
        noted = done.get(step.name, {})
        title = f"[{number}/{len(config.steps)}] {step.name}"
        if noted.get("digest") == before and noted.get("seconds") is not None:
            print(f"{title}: done before, in {noted['seconds']:.0f} s", flush=True)
            continue
        if noted and noted["digest"] != before and step.run.startswith("recipes."):
            shutil.rmtree(here, ignore_errors=True)  # another training; the data tools keep what is still of use
        done[step.name] = {"digest": before, "seconds": None}
        _write(record, done)
        print(f"\n{title}\n$ {shlex.join(command)}", flush=True)
        code, seconds = run_step(command, output / "step.pid")
        if code != 0:
            print(
                f"\nerror: step '{step.name}' ended with status {code}; the same command goes on from it",
                file=sys.stderr,
            )
            return code
        done[step.name]["seconds"] = round(seconds, 1)
        _write(record, done)
    times = ", ".join(f"{name} {one['seconds']:.0f} s" for name, one in done.items() if name in commands)
    print(f"\ndone: {output} ({times})")
    return 0


def command_of(step: StepConfig, config: PipelineConfig, output: Path) -> list[str]:
    """What is started. Raises ConfigError: a `{name}` that stands for nothing, a config that is not there."""
    known = {**config.values, "output": str(output), "here": str(output / step.name)}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [filled(one) for one in value]
        if not isinstance(value, str):
            return value
        names = _NAME.findall(value)
        for name in names:
            if name not in known:
                raise ConfigError(f"steps '{step.name}': {{{name}}} stands for nothing; {nearest(name, known)}")
        whole = _NAME.fullmatch(value)
        return known[names[0]] if whole else _NAME.sub(lambda found: str(known[found[1]]), value)

    launcher = ["-m", "accelerate.commands.launch"] if step.launcher == "accelerate" else []
    command = [sys.executable, *launcher, "-m", step.run]
    if step.config is not None:
        if not (REPOSITORY / step.config).is_file():
            raise ConfigError(f"steps '{step.name}': there is no {step.config} in the repository")
        command += ["--config", step.config]
        command += [f"{key}={json.dumps(filled(value), ensure_ascii=False)}" for key, value in step.set.items()]
    for argument in step.arguments:
        value = filled(argument)
        command += [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return command


def run_step(command: Sequence[str], note: Path) -> tuple[int, float]:
    """(exit status, seconds) of a command, which ends with this process, however that one ends.

    Args:
        note: names the process that guards it; one that a killed job left is waited for.
    """
    while note.exists() and _guards(note.read_text(encoding="utf-8")):
        time.sleep(0.1)
    environment = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"} | os.environ
    began = time.monotonic()
    guarded = [sys.executable, "-m", "mmembed.guard", str(os.getpid()), *command]
    process = subprocess.Popen(guarded, cwd=REPOSITORY, env=environment)
    try:
        note.write_text(str(process.pid), encoding="utf-8")
        code = process.wait()
    except BaseException:  # of any kind: a step ends with the job
        process.terminate()
        process.wait()
        note.unlink(missing_ok=True)
        raise
    note.unlink()
    return code, time.monotonic() - began


def _guards(pid: str) -> bool:
    """Whether a process is one that guards a step."""
    try:
        return b"mmembed.guard" in Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return False


def _write(record: Path, done: dict[str, dict[str, Any]]) -> None:
    staged = record.with_suffix(".writing")
    staged.write_text(json.dumps(done, indent=1), encoding="utf-8")
    staged.replace(record)


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
